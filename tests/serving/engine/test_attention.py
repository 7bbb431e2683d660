"""Against softmax attention written out, over random fragmentations, chunkings and mixes of sequences."""

from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.attention import attend_for, attend_plain, merge_partials, paged_attention
from serving.engine.kv_pool import KVLayout, KVPool
from serving.engine.runner import set_num_threads
from serving.engine.step_batch import SequencePart, build_step_batch

BLOCK_SIZE = 4
HEAD_DIM = 8
"""Too small for the kernels, so torch attends."""
KERNEL_DIMS = (16, 64, 80, 128)

torch.set_num_threads(1)


class AttentionLayer(torch.nn.Module):
    """What `paged_attention` reads of a layer."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int) -> torch.Tensor:
    """Causal attention of `(n, H, D)` queries from `position` on over `(S, Hkv, D)` keys, in float64."""
    groups = query.shape[1] // keys.shape[1]
    keys = keys.double().repeat_interleave(groups, dim=1)
    values = values.double().repeat_interleave(groups, dim=1)
    scores = torch.einsum("nhd,shd->hns", query.double(), keys) * query.shape[2] ** -0.5
    hidden = torch.arange(len(keys)) > torch.arange(position, position + len(query)).unsqueeze(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hns,shd->nhd", weights, values)


@dataclass(frozen=True)
class Sequence:
    """Queries, keys and values of all tokens of a sequence, and where its KV lies."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_table: list[int]


def make_sequences(
    lengths: list[int],
    tables: list[int],
    num_kv_heads: int,
    groups: int,
    dtype: torch.dtype = torch.float32,
    head_dim: int = HEAD_DIM,
) -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, num_heads: int) -> torch.Tensor:
        return (2 * torch.randn(length, num_heads, head_dim, generator=generator)).to(dtype)

    sequences = []
    for length in lengths:
        num_blocks = -(-length // BLOCK_SIZE)
        query = draw(length, num_kv_heads * groups)
        keys, values = draw(length, num_kv_heads), draw(length, num_kv_heads)
        sequences.append(Sequence(query, keys, values, tables[:num_blocks]))
        tables = tables[num_blocks:]
    return sequences


def run_step(pool: KVPool, sequences: list[Sequence], spans: list[tuple[int, int]]) -> list[torch.Tensor]:
    """One step over `[first, last)` of each sequence in layer 1; outputs `(n, H, D)`."""
    chosen = [(s, first, last) for s, (first, last) in zip(sequences, spans, strict=True) if last > first]
    parts = [SequencePart([0] * (last - first), first, s.block_table) for s, first, last in chosen]
    batch = build_step_batch(pool, parts)
    query, keys, values = (
        torch.cat([getattr(s, name)[first:last] for s, first, last in chosen]).transpose(0, 1).unsqueeze(0)
        for name in ("query", "keys", "values")
    )
    head_dim = query.shape[3]
    out, _ = paged_attention(AttentionLayer(1), query, keys, values, None, scaling=head_dim**-0.5, batch=batch)
    assert out.is_contiguous()
    assert out.shape == (1, batch.num_tokens, query.shape[1], head_dim)
    return list(torch.split(out[0], [last - first for _, first, last in chosen]))


def make_pool(num_blocks: int, num_kv_heads: int, dtype: str = "float32", head_dim: int = HEAD_DIM) -> KVPool:
    pool = KVPool(KVLayout(2, num_kv_heads, head_dim, BLOCK_SIZE, dtype), num_blocks)
    pool.kv.fill_(float("nan"))  # any slot read before it is written shows
    return pool


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 3),
    groups=st.integers(1, 8),
    head_dim=st.sampled_from((HEAD_DIM, *KERNEL_DIMS)),
    shuffled=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_equals_plain_attention_however_blocks_lie_and_chunks_are_cut(
    lengths: list[int], num_kv_heads: int, groups: int, head_dim: int, shuffled: bool, seed: int
) -> None:
    random = Random(seed)
    num_blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
    tables = list(range(num_blocks))
    if shuffled:
        random.shuffle(tables)
    sequences = make_sequences(lengths, tables, num_kv_heads, groups, head_dim=head_dim)
    pool = make_pool(num_blocks, num_kv_heads, head_dim=head_dim)
    done = [0] * len(lengths)
    outputs: list[list[torch.Tensor]] = [[] for _ in lengths]
    while done != lengths:
        steps = [random.choice([0, 1, 1, 2, 17, 40]) for _ in lengths]
        spans = [(at, min(at + step, end)) for at, step, end in zip(done, steps, lengths, strict=True)]
        running = [index for index, (first, last) in enumerate(spans) if last > first]
        if not running:
            continue
        for index, out in zip(running, run_step(pool, sequences, spans), strict=True):
            outputs[index].append(out)
        done = [last for _, last in spans]
    for sequence, pieces in zip(sequences, outputs, strict=True):
        expected = reference(sequence.query, sequence.keys, sequence.values, 0)
        torch.testing.assert_close(torch.cat(pieces).double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("head_dim", [HEAD_DIM, 64])
@pytest.mark.parametrize("length", [1, 5, 100])
@pytest.mark.parametrize("stride", [1, 2])
def test_long_past_in_one_run_or_many(length: int, stride: int, head_dim: int) -> None:
    table = list(range(0, 50 * stride, stride))
    (sequence,) = make_sequences([200], table, num_kv_heads=2, groups=2, head_dim=head_dim)
    pool = make_pool(100, num_kv_heads=2, head_dim=head_dim)
    run_step(pool, [sequence], [(0, 200 - length)])
    (out,) = run_step(pool, [sequence], [(200 - length, 200)])
    expected = reference(sequence.query[200 - length :], sequence.keys, sequence.values, 200 - length)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_rows_are_written_to_their_slots_and_only_in_their_layer() -> None:
    (sequence,) = make_sequences([6], [3, 1], num_kv_heads=2, groups=1)
    pool = make_pool(5, num_kv_heads=2)
    run_step(pool, [sequence], [(0, 6)])
    assert torch.equal(pool.kv[1, 0, 12:16], sequence.keys[:4])
    assert torch.equal(pool.kv[1, 1, 4:6], sequence.values[4:])
    assert int(pool.kv.isfinite().sum()) == 2 * 6 * 2 * HEAD_DIM


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_pools(dtype: str) -> None:
    (sequence,) = make_sequences([40], [0, 1, 2, 5, 6, 9, 10, 11, 12, 13], 2, 2, getattr(torch, dtype))
    pool = make_pool(14, num_kv_heads=2, dtype=dtype)
    pieces = [run_step(pool, [sequence], [span])[0] for span in ((0, 17), (17, 39), (39, 40))]
    out = torch.cat(pieces)
    assert out.dtype == getattr(torch, dtype)
    expected = reference(sequence.query, sequence.keys, sequence.values, 0)
    torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries", [1, 7, 33])
def test_plain_operations_give_what_the_cpu_kernel_gives(num_queries: int, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    num_keys = num_queries if is_causal else 50
    query = torch.randn(2, 3, num_queries, HEAD_DIM, generator=generator) * 4
    keys = torch.randn(num_keys, 2, HEAD_DIM, generator=generator).transpose(0, 1).unsqueeze(1).expand(-1, 3, -1, -1)
    values = torch.randn(num_keys, 2, HEAD_DIM, generator=generator).transpose(0, 1).unsqueeze(1).expand(-1, 3, -1, -1)
    expected_out, expected_lse = attend_for(torch.device("cpu"))(query, keys, values, is_causal, HEAD_DIM**-0.5)
    out, lse = attend_plain(query, keys, values, is_causal, HEAD_DIM**-0.5)
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_other_devices_attend_with_plain_operations() -> None:
    assert attend_for(torch.device("cuda")) is attend_plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_hides_keys_on_every_path(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    query, keys, values = (torch.randn(2, 3, n, HEAD_DIM, generator=generator).to(dtype) for n in (4, 50, 50))
    mask = torch.zeros(2, 1, 1, 50, dtype=dtype)
    mask[0, ..., 20:] = float("-inf")
    for attend in (attend_for(torch.device("cpu")), attend_plain):
        out, lse = attend(query, keys, values, False, HEAD_DIM**-0.5, mask)
        short_out, short_lse = attend_plain(query[:1], keys[:1, :, :20], values[:1, :, :20], False, HEAD_DIM**-0.5)
        full_out, full_lse = attend_plain(query[1:], keys[1:], values[1:], False, HEAD_DIM**-0.5)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out, torch.cat((short_out, full_out)), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse, torch.cat((short_lse, full_lse)), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("groups", [1, 3, 4, 5])
@pytest.mark.parametrize("lengths", [[700], [64, 65], [500, 503, 511], [1200, 300, 7, 1], [129] * 5])
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 16, 80])
def test_single_tokens_of_long_sequences_together(lengths: list[int], groups: int, head_dim: int) -> None:
    num_blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
    # A few cuts: sequences in several runs, some of them swapped.
    tables = list(range(num_blocks))
    tables = tables[num_blocks // 3 :] + tables[: num_blocks // 3]
    sequences = make_sequences(lengths, tables, 2, groups, head_dim=head_dim)
    pool = make_pool(num_blocks, 2, head_dim=head_dim)
    run_step(pool, sequences, [(0, length - 1) for length in lengths])
    outs = run_step(pool, sequences, [(length - 1, length) for length in lengths])
    for out, sequence, length in zip(outs, sequences, lengths, strict=True):
        expected = reference(sequence.query[-1:], sequence.keys, sequence.values, length - 1)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 60.0])
def test_scores_of_any_size(scale: float) -> None:
    """Large ones leave one key all the weight, and come in any order."""
    (sequence,) = make_sequences([300], list(range(75)), 1, 3, head_dim=64)
    sequence = replace(sequence, query=sequence.query * scale)
    pool = make_pool(75, 1, head_dim=64)
    out = torch.cat([run_step(pool, [sequence], [span])[0] for span in ((0, 130), (130, 299), (299, 300))])
    expected = reference(sequence.query, sequence.keys, sequence.values, 0)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=2e-3)


def test_chunks_of_several_sequences_on_any_number_of_threads() -> None:
    lengths = [130, 70, 2, 33]
    num_blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
    sequences = make_sequences(lengths, list(range(num_blocks)), 3, 3, head_dim=64)
    spans = [(0, length) for length in lengths]
    before = torch.get_num_threads()
    outs = []
    try:
        for num_threads in (1, 2, 5):
            set_num_threads(num_threads)
            outs.append(torch.cat(run_step(make_pool(num_blocks, 3, head_dim=64), sequences, spans)))
    finally:
        set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    expected = torch.cat([reference(s.query, s.keys, s.values, 0) for s in sequences])
    torch.testing.assert_close(outs[0].double(), expected, atol=2e-5, rtol=2e-5)


def test_a_part_without_weight_leaves_the_other_as_it_is() -> None:
    out, lse = torch.randn(1, 1, 3, HEAD_DIM), torch.zeros(1, 1, 3)
    merged = merge_partials([(out, lse), (torch.randn_like(out), lse - 1000)])
    assert torch.equal(merged, out)
