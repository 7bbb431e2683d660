from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from serving.engine.kv_pool import KV_DTYPES, Bytes, KVLayout, KVPool

BLOCK_SIZE = 8


def make_pool(dtype: str = "float32", num_blocks: int = 6, seed: int = 0) -> KVPool:
    """A pool whose every bit is random, NaNs and denormals included."""
    pool = KVPool(KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=BLOCK_SIZE, dtype=dtype), num_blocks)
    generator = torch.Generator().manual_seed(seed)
    raw = pool.kv.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))
    return pool


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def exported(pool: KVPool, blocks: list[tuple[int, int]]) -> Bytes:
    num_tokens = sum(num for _, num in blocks)
    out = np.zeros(num_tokens * pool.layout.bytes_per_token, dtype=np.uint8)
    pool.export(blocks, out)
    return out


def test_layout_counts_keys_and_values_of_all_layers() -> None:
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=32, dtype="float32")
    assert layout.bytes_per_token == 46_080
    assert layout.block_bytes == 46_080 * 32
    assert KVLayout(30, 3, 64, 32, "bfloat16").bytes_per_token == 23_040


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_export_is_block_major_and_each_block_is_contiguous(dtype: str) -> None:
    pool = make_pool(dtype)
    out = exported(pool, [(4, BLOCK_SIZE), (1, 3)])
    first = pool.kv[:, :, 4 * BLOCK_SIZE : 5 * BLOCK_SIZE]
    second = pool.kv[:, :, BLOCK_SIZE : BLOCK_SIZE + 3]
    expected = torch.cat([bits(first).flatten(), bits(second).flatten()])
    assert out.tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_import_restores_every_bit_and_touches_nothing_else(dtype: str) -> None:
    source, target = make_pool(dtype, seed=1), make_pool(dtype, seed=2)
    before = bits(target.kv).clone()
    payload = exported(source, [(2, BLOCK_SIZE)])
    payload.flags.writeable = False  # as stored payloads are
    target.import_(5, BLOCK_SIZE, payload)
    block = slice(5 * BLOCK_SIZE, 6 * BLOCK_SIZE)
    assert torch.equal(bits(target.kv[:, :, block]), bits(source.kv[:, :, 2 * BLOCK_SIZE : 3 * BLOCK_SIZE]))
    after = bits(target.kv).clone()
    after[:, :, block] = before[:, :, block]
    assert torch.equal(after, before)


@pytest.mark.parametrize(("num_tokens", "stored_tokens"), [(1, 8), (5, 8), (3, 4), (4, 4)])
def test_import_takes_the_first_tokens_of_a_stored_block(num_tokens: int, stored_tokens: int) -> None:
    source, target = make_pool(seed=1), make_pool(seed=2)
    untouched = bits(target.kv[:, :, num_tokens:]).clone()
    target.import_(0, num_tokens, exported(source, [(3, stored_tokens)]), stored_tokens)
    start = 3 * BLOCK_SIZE
    assert torch.equal(bits(target.kv[:, :, :num_tokens]), bits(source.kv[:, :, start : start + num_tokens]))
    assert torch.equal(bits(target.kv[:, :, num_tokens:]), untouched)


def test_import_accepts_a_payload_at_any_offset() -> None:
    source, target = make_pool(seed=1), make_pool(seed=2)
    payload = exported(source, [(0, BLOCK_SIZE)])
    unaligned = np.empty(len(payload) + 1, dtype=np.uint8)[1:]
    unaligned[:] = payload
    target.import_(0, BLOCK_SIZE, unaligned)
    assert torch.equal(bits(target.kv[:, :, :BLOCK_SIZE]), bits(source.kv[:, :, :BLOCK_SIZE]))


def test_copy_rows_copies_all_layers() -> None:
    pool = make_pool()
    before = bits(pool.kv).clone()
    pool.copy_rows(src_slot=8, dst_slot=32, num_tokens=5)
    after = bits(pool.kv)
    assert torch.equal(after[:, :, 32:37], before[:, :, 8:13])
    assert torch.equal(after[:, :, :32], before[:, :, :32])
    assert torch.equal(after[:, :, 37:], before[:, :, 37:])


def test_disjoint_blocks_can_be_loaded_at_the_same_time() -> None:
    source, target = make_pool(num_blocks=64, seed=1), make_pool(num_blocks=64, seed=2)
    payloads = [exported(source, [(block_id, BLOCK_SIZE)]) for block_id in range(64)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda block_id: target.import_(block_id, BLOCK_SIZE, payloads[block_id]), range(64)))
    assert torch.equal(bits(target.kv), bits(source.kv))


def test_what_does_not_fit_is_refused() -> None:
    pool = make_pool()
    one_block = np.zeros(pool.layout.block_bytes, dtype=np.uint8)
    with pytest.raises(ValueError, match="expected 1536 contiguous bytes"):
        pool.import_(0, BLOCK_SIZE, one_block[:-1])
    with pytest.raises(ValueError, match="contiguous"):
        pool.export([(0, BLOCK_SIZE)], np.zeros(2 * pool.layout.block_bytes, dtype=np.uint8)[::2])
    with pytest.raises(ValueError, match="not in this pool"):
        pool.import_(6, BLOCK_SIZE, one_block)
    with pytest.raises(ValueError, match="9 tokens do not fit a block of 8"):
        pool.export([(0, 9)], np.zeros(9 * pool.layout.bytes_per_token, dtype=np.uint8))
    with pytest.raises(ValueError, match="8 tokens wanted from a stored block of 4"):
        pool.import_(0, 8, one_block[: len(one_block) // 2], stored_tokens=4)
    with pytest.raises(ValueError, match="overlap"):
        pool.copy_rows(0, 3, 4)
    with pytest.raises(ValueError, match="not all in this pool"):
        pool.copy_rows(0, 44, 5)
