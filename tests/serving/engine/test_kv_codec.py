"""Stored dtypes: exact sizes and layout, the promised precision, and sane answers for values that do not fit."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cache.extent import KVShape
from serving.engine.kv_codec import STORED_DTYPES, make_codec
from serving.engine.kv_pool import KV_DTYPES, Bytes, KVLayout, KVPool

LAYERS, HEADS, DIM, BLOCK_SIZE = 3, 2, 5, 8
"""An odd head, so that nothing is aligned by chance."""
PAIRS = [(engine, stored) for engine, stored in itertools.product(KV_DTYPES, KVShape.DTYPES) if engine != stored]
"""Every conversion that there is."""


def make_pool(engine: str, stored: str, *, num_blocks: int = 4, seed: int = 0) -> KVPool:
    pool = KVPool(KVLayout(LAYERS, HEADS, DIM, BLOCK_SIZE, engine), num_blocks, stored_dtype=stored)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(pool.kv.shape, generator=generator)
    # Heads of very different size, as keys and values have them.
    sizes = torch.rand((*pool.kv.shape[:-1], 1), generator=generator) * 8 - 4
    pool.kv.copy_(values * sizes.exp())
    return pool


def exported(pool: KVPool, blocks: list[tuple[int, int]]) -> Bytes:
    out = np.zeros(pool.stored_shape.bytes_per_token * sum(num for _, num in blocks), np.uint8)
    pool.export(blocks, out)
    out.flags.writeable = False  # as stored payloads are
    return out


def rows(pool: KVPool, block_id: int, num_tokens: int = BLOCK_SIZE) -> torch.Tensor:
    return pool.kv[:, :, block_id * BLOCK_SIZE : block_id * BLOCK_SIZE + num_tokens]


def stored_and_loaded(engine: str, stored: str, values: torch.Tensor) -> torch.Tensor:
    """`(DIM,)` or broader values in the first head of the first token of all layers, after a store and a load."""
    pool = make_pool(engine, stored, num_blocks=2)
    pool.kv[:, :, 0, 0] = values.to(pool.kv.dtype)
    pool.import_(1, BLOCK_SIZE, exported(pool, [(0, BLOCK_SIZE)]))
    back = pool.kv[0, 0, BLOCK_SIZE, 0].clone()
    others = (rows(pool, 0).float() - rows(pool, 1).float())[:, :, 1:]
    assert torch.isfinite(others).all(), "other tokens are not touched by what this one holds"
    return back


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [("float32", 46_080), ("bfloat16", 23_040), ("float16", 23_040), ("float8_e4m3fn", 11_520), ("int8", 12_240)],
)
def test_a_stored_token_has_its_exact_size(dtype: str, num_bytes: int) -> None:
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32, dtype="float32")
    assert layout.stored_shape(dtype).bytes_per_token == num_bytes
    assert layout.stored_shape().bytes_per_token == layout.bytes_per_token == 46_080


def test_an_unknown_dtype_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"can't be stored as 'int4', choose one of float32, .*, int8"):
        make_pool("float32", "int4")


def test_the_engine_s_own_dtype_needs_no_codec() -> None:
    for name, dtype in KV_DTYPES.items():
        assert make_codec(dtype, KVShape(1, 1, 4, name)) is None


@pytest.mark.parametrize(("engine", "stored"), PAIRS)
def test_each_block_is_contiguous_and_alone(engine: str, stored: str) -> None:
    pool = make_pool(engine, stored)
    both = exported(pool, [(3, BLOCK_SIZE), (1, 3)])
    apart = [exported(pool, [(3, BLOCK_SIZE)]), exported(pool, [(1, 3)])]
    assert both.tobytes() == b"".join(part.tobytes() for part in apart)
    assert len(apart[1]) == 3 * pool.stored_shape.bytes_per_token


@pytest.mark.parametrize(("engine", "stored"), [pair for pair in PAIRS if pair[1] != "int8"])
def test_a_cast_is_to_nearest_and_touches_no_other_block(engine: str, stored: str) -> None:
    pool = make_pool(engine, stored)
    before = pool.kv.clone()
    pool.import_(2, BLOCK_SIZE, exported(pool, [(0, BLOCK_SIZE)]))
    expected = before.clone()
    expected[:, :, 2 * BLOCK_SIZE : 3 * BLOCK_SIZE] = rows(pool, 0).to(STORED_DTYPES[stored]).to(pool.kv.dtype)
    assert torch.equal(pool.kv, expected)
    if torch.finfo(STORED_DTYPES[stored]).bits > torch.finfo(pool.kv.dtype).bits:
        assert torch.equal(rows(pool, 2), rows(pool, 0)), "a wider dtype keeps every bit"


@pytest.mark.parametrize("engine", KV_DTYPES)
def test_int8_is_off_by_half_a_step_of_its_head_at_most(engine: str) -> None:
    pool = make_pool(engine, "int8")
    before = pool.kv.clone()
    pool.import_(2, BLOCK_SIZE, exported(pool, [(0, BLOCK_SIZE)]))
    exact, loaded = rows(pool, 0).double(), rows(pool, 2).double()
    steps = exact.abs().amax(-1, keepdim=True) / 127
    # The engine's dtype rounds what comes back once more.
    slack = loaded.abs() * torch.finfo(pool.kv.dtype).eps
    assert ((exact - loaded).abs() <= steps / 2 * 1.00001 + slack).all()
    assert not torch.equal(exact, loaded)
    before[:, :, 2 * BLOCK_SIZE : 3 * BLOCK_SIZE] = rows(pool, 2)
    assert torch.equal(pool.kv, before)


def test_int8_is_laid_out_as_documented() -> None:
    pool = make_pool("float32", "int8")
    num_tokens = 6
    planes = exported(pool, [(1, num_tokens)]).reshape(LAYERS, 2, -1)
    split = num_tokens * HEADS * DIM
    values = planes[:, :, :split].view(np.int8).reshape(LAYERS, 2, num_tokens, HEADS, DIM)
    scales = planes[:, :, split:].copy().view(np.float32).reshape(LAYERS, 2, num_tokens, HEADS)
    exact = rows(pool, 1, num_tokens).numpy()
    assert np.array_equal(scales, np.abs(exact).max(-1) / np.float32(127))
    assert np.array_equal(values, np.rint(exact / scales[..., None]))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize(("num_tokens", "stored_tokens"), [(1, 8), (5, 8), (3, 4), (4, 4)])
def test_the_first_tokens_of_a_stored_block_can_be_taken(stored: str, num_tokens: int, stored_tokens: int) -> None:
    pool = make_pool("float32", stored)
    payload = exported(pool, [(0, stored_tokens)])
    before = pool.kv.clone()
    pool.import_(1, stored_tokens, payload)
    pool.import_(2, num_tokens, payload, stored_tokens)
    assert torch.equal(rows(pool, 2, num_tokens), rows(pool, 1, num_tokens))
    untouched = 2 * BLOCK_SIZE + num_tokens
    assert torch.equal(pool.kv[:, :, untouched:], before[:, :, untouched:])


@pytest.mark.parametrize("stored", ["float16", "float8_e4m3fn", "int8"])
def test_a_payload_may_lie_at_any_address(stored: str) -> None:
    pool = make_pool("float32", stored)
    payload = exported(pool, [(0, BLOCK_SIZE)])
    shifted = np.empty(len(payload) + 1, np.uint8)[1:]
    pool.export([(0, BLOCK_SIZE)], shifted)
    assert shifted.tobytes() == payload.tobytes()
    pool.import_(1, BLOCK_SIZE, payload)
    pool.import_(2, BLOCK_SIZE, shifted)
    assert torch.equal(rows(pool, 1), rows(pool, 2))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float8_e4m3fn", "int8"])
def test_storing_again_what_was_loaded_loses_nothing_more(stored: str) -> None:
    pool = make_pool("float32", stored)
    pool.import_(1, BLOCK_SIZE, exported(pool, [(0, BLOCK_SIZE)]))
    pool.import_(2, BLOCK_SIZE, exported(pool, [(1, BLOCK_SIZE)]))
    assert torch.allclose(rows(pool, 1), rows(pool, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("engine", KV_DTYPES)
def test_every_float8_is_read_as_torch_reads_it(engine: str) -> None:
    codec = make_codec(KV_DTYPES[engine], KVShape(1, 1, 128, "float8_e4m3fn"))
    assert codec is not None
    codes = np.arange(256, dtype=np.uint8)
    with_nan = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(KV_DTYPES[engine])
    for kept in (codes, np.where((codes & 0x7F) == 0x7F, 0, codes).astype(np.uint8)):
        kv = torch.empty(1, 2, 1, 1, 128, dtype=KV_DTYPES[engine])
        codec.decode(kept, kv)
        expected = torch.from_numpy(kept).view(torch.float8_e4m3fn).to(kv.dtype)
        assert torch.equal(kv.flatten().nan_to_num(-1.0), expected.nan_to_num(-1.0))
        assert torch.equal(kv.flatten().signbit(), expected.signbit()), "minus zero too"
    assert with_nan.isnan().sum() == 2


@pytest.mark.parametrize(("engine", "stored"), PAIRS)
def test_zeros_and_tiny_heads_come_back_as_good_as_zero(engine: str, stored: str) -> None:
    assert torch.equal(stored_and_loaded(engine, stored, torch.zeros(DIM)).float(), torch.zeros(DIM))
    smallest = torch.finfo(KV_DTYPES[engine]).tiny
    for size in (smallest, smallest / 4):
        back = stored_and_loaded(engine, stored, torch.tensor([size, 0.0, -size, 0.0, size / 2])).float()
        assert back.abs().max() <= size * 1.01
        assert back[1] == back[3] == 0


@pytest.mark.parametrize(("engine", "stored"), PAIRS)
def test_what_does_not_fit_becomes_the_largest_number(engine: str, stored: str) -> None:
    largest = torch.finfo(KV_DTYPES[engine]).max
    if engine == "float32":
        largest *= 0.99  # bfloat16 ends a little earlier
    back = stored_and_loaded(engine, stored, torch.tensor([largest, -largest, 1.0, 0.0, 0.0])).double()
    assert torch.isfinite(back).all()
    if stored == "int8":
        limit = largest
    else:
        limit = min(largest, torch.finfo(STORED_DTYPES[stored]).max)
    assert back[0] == -back[1] == pytest.approx(limit, rel=0.005)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("engine", "stored"), PAIRS)
def test_what_is_no_number_is_not_taken_for_one(engine: str, stored: str, bad: float) -> None:
    back = stored_and_loaded(engine, stored, torch.tensor([bad, 1.0, -2.0, 0.0, 0.5]))
    if stored == "int8":
        assert not torch.isfinite(back).any(), "the whole head is marked"
    elif np.isnan(bad):
        assert back[0].isnan()
    elif stored in ("float16", "float8_e4m3fn") or (engine, stored) == ("float16", "bfloat16"):
        largest = min(torch.finfo(dtype).max for dtype in (KV_DTYPES[engine], STORED_DTYPES[stored]))
        assert float(back[0]) == pytest.approx(np.copysign(largest, bad), rel=0.005)
    else:
        assert float(back[0]) == bad
    if stored != "int8":
        assert back[1:].float().tolist() == [1.0, -2.0, 0.0, 0.5]


@pytest.mark.parametrize("stored", ["float16", "float8_e4m3fn", "int8"])
def test_disjoint_blocks_can_be_converted_at_the_same_time(stored: str) -> None:
    num_blocks = 32
    source = make_pool("float32", stored, num_blocks=num_blocks, seed=1)
    target = make_pool("float32", stored, num_blocks=num_blocks, seed=2)
    expected = make_pool("float32", stored, num_blocks=num_blocks, seed=2)

    def move(block_id: int) -> None:
        target.import_(block_id, BLOCK_SIZE, exported(source, [(block_id, BLOCK_SIZE)]))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(move, range(num_blocks)))
    for block_id in range(num_blocks):
        expected.import_(block_id, BLOCK_SIZE, exported(source, [(block_id, BLOCK_SIZE)]))
    assert torch.equal(target.kv, expected.kv)
    assert not torch.equal(target.kv, make_pool("float32", stored, num_blocks=num_blocks, seed=2).kv)


def test_a_payload_of_another_size_is_refused() -> None:
    pool = make_pool("float32", "int8")
    payload = exported(pool, [(0, BLOCK_SIZE)])
    with pytest.raises(ValueError, match="contiguous bytes"):
        pool.import_(1, BLOCK_SIZE, payload[:-1])
    with pytest.raises(ValueError, match="contiguous bytes"):
        pool.export([(0, BLOCK_SIZE)], np.empty(pool.layout.block_bytes, np.uint8))
