"""What FlashAttention would be given on CUDA, run on the CPU with a function that does what its documentation says."""

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from serving.engine.flash import Mode, Span, attend_flash, choose_mode, plan_flash
from serving.engine.kv_pool import KVLayout, KVPool
from serving.engine.step_batch import SequencePart, build_step_batch
from tests.serving.engine.test_attention import reference

BLOCK_SIZE = 4
CPU = torch.device("cpu")
MODES: tuple[Mode, ...] = ("paged", "gathered")


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> torch.Tensor:
    """`varlen_attn`, sequence by sequence; `reference` has its scale."""
    assert window_size == (-1, 0)
    assert scale == query.shape[2] ** -0.5
    assert enable_gqa == (query.shape[1] != key.shape[-2])
    assert cu_seq_q.dtype == torch.int32
    outs = []
    for at, (first, last) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
        if block_table is not None:
            assert cu_seq_k is None
            assert seqused_k is not None
            num_keys = int(seqused_k[at])
            keys, values = (pages[block_table[at].long()].flatten(0, 1)[:num_keys] for pages in (key, value))
        else:
            assert cu_seq_k is not None
            keys, values = (rows[cu_seq_k[at] : cu_seq_k[at + 1]] for rows in (key, value))
        assert last - first <= max_q
        assert len(keys) <= max_k
        outs.append(reference(query[first:last], keys, values, len(keys) - (last - first)))
    return torch.cat(outs).to(query.dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_each_part_attends_to_its_own_keys(mode: Mode, seed: int) -> None:
    random = Random(seed)
    blocks = random.sample(range(40), 40)
    spans: list[Span] = []
    for _ in range(random.randint(1, 5)):
        num_keys = random.randint(1, 30)
        table = [blocks.pop() for _ in range(-(-num_keys // BLOCK_SIZE))]
        spans.append(Span(random.choice([1, random.randint(1, num_keys)]), num_keys, [*table, 39]))
    kv = torch.randn(2, 40 * BLOCK_SIZE, 2, 8, generator=torch.Generator().manual_seed(seed))
    total = sum(span.num_queries for span in spans)
    query = torch.randn(total, 6, 8, generator=torch.Generator().manual_seed(seed + 1))
    attended = attend_flash(plan_flash(spans, BLOCK_SIZE, mode, CPU), kv, query, 8**-0.5, varlen)
    lengths = [span.num_queries for span in spans]
    for part, span, out in zip(torch.split(query, lengths), spans, torch.split(attended, lengths), strict=True):
        slots = [span.block_table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(span.num_keys)]
        expected = reference(part, kv[0, slots], kv[1, slots], span.num_keys - span.num_queries)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_shapes_are_what_torchs_function_takes(mode: Mode) -> None:
    """Its shapes alone: nothing is computed on this device."""
    meta = torch.device("meta")
    plan = plan_flash([Span(5, 9, [0, 1, 2]), Span(1, 4, [3])], BLOCK_SIZE, mode, meta)
    kv = torch.empty(2, 16, 2, 16, dtype=torch.bfloat16, device=meta)
    query = torch.empty(6, 10, 16, dtype=torch.bfloat16, device=meta)[:, :6]
    out = attend_flash(plan, kv, query, 0.25, varlen_attn)
    assert out.shape == (6, 6, 16)
    assert out.dtype == torch.bfloat16


def refusing(kind: Mode) -> Any:
    def call(*args: Any, **options: Any) -> torch.Tensor:
        if (options["block_table"] is not None) == (kind == "paged"):
            raise RuntimeError(f"no {kind} keys")
        return varlen(*args, **options)

    return call


def wrong(*args: Any, **options: Any) -> torch.Tensor:
    return varlen(*args, **options) * 1.1


def test_what_works_is_used_and_nothing_else() -> None:
    shape = (BLOCK_SIZE, 2, 16)

    def choose(function: Any, dtype: torch.dtype = torch.bfloat16) -> Mode | None:
        return choose_mode(shape, 6, dtype, CPU, function)

    assert choose(varlen) == "paged"
    assert choose(varlen, torch.float16) == "paged"
    assert choose(refusing("paged")) == "gathered"
    assert choose(refusing("gathered")) == "paged"
    assert choose(wrong) is None, "a result that is off by a tenth is not taken"
    assert choose(varlen, torch.float32) is None, "it knows half precision only"
    assert choose_mode(shape, 6, torch.bfloat16, CPU) is None, "and no CPU"


def test_a_step_is_planned_for_it_as_a_whole() -> None:
    pool = KVPool(KVLayout(1, 2, 16, BLOCK_SIZE, "bfloat16"), 16)
    parts = [SequencePart([5, 6, 7], 6, [2, 3, 9]), SequencePart([8], 7, [5, 6]), SequencePart([1, 2], 0, [15])]
    batch = build_step_batch(pool, parts, "gathered")
    assert batch.decode_plan is None
    assert batch.chunk_plan is None
    assert batch.segments == ()
    plan = batch.flash_plan
    assert plan is not None
    assert plan.cu_queries.tolist() == [0, 3, 4, 6]
    assert plan.cu_keys is not None
    assert plan.cu_keys.tolist() == [0, 9, 17, 19]
    assert plan.slots is not None
    assert plan.slots.tolist() == [*range(8, 16), 36, *range(20, 28), 60, 61]
    paged = build_step_batch(pool, parts, "paged").flash_plan
    assert paged is not None
    assert _tables(paged.block_tables) == [[2, 3, 9], [5, 6, 0], [15, 0, 0]]
    assert _tables(paged.num_keys) == [9, 8, 2]


def _tables(tensor: torch.Tensor | None) -> Sequence[Any]:
    assert tensor is not None
    values: list[Any] = tensor.tolist()
    return values
