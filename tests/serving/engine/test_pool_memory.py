"""Memory is there before it is written, and what is in the pool stays."""

import sys
from pathlib import Path

import pytest
import torch

from serving.engine.kv_pool import KVLayout, KVPool
from serving.engine.pool_memory import PoolMemory, populate

LAYOUT = KVLayout(num_layers=4, num_kv_heads=4, head_dim=64, block_size=32, dtype="float32")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is done elsewhere")
def test_the_next_blocks_have_memory_and_the_others_have_none() -> None:
    pool = KVPool(LAYOUT, num_blocks=2048)  # 512 MiB
    before = resident_bytes()
    memory = PoolMemory(pool, ahead_bytes=64 << 20)
    memory.reach(0)
    memory.reach(8)  # not worth a call
    memory.close()
    gained = resident_bytes() - before
    # Pages of 2 MiB at both ends of each layer's keys and values.
    assert 60 << 20 <= gained <= (64 << 20) + 8 * 2 * (2 << 20)


def test_content_stays() -> None:
    pool = KVPool(LAYOUT, num_blocks=16)
    pool.kv.normal_(generator=torch.Generator().manual_seed(0))
    before = pool.kv.clone()
    populate(pool, 0, 16)
    populate(pool, 3, 4)
    assert torch.equal(pool.kv, before)


def test_no_block_beyond_the_pool_and_none_twice() -> None:
    pool = KVPool(LAYOUT, num_blocks=10)
    memory = PoolMemory(pool, ahead_bytes=4 * LAYOUT.block_bytes)
    told = [repr(memory)]
    for num_blocks in (0, 1, 8, 10, 0):
        memory.reach(num_blocks)
        told.append(repr(memory))
    memory.close()
    assert told == [f"<PoolMemory {count} of 10 blocks>" for count in (0, 4, 5, 10, 10, 10)]
