"""How the warehouse's index grows: opening, memory and lookups with so many blocks, without any KV.

    python -m serving.bench.warehouse_index NUM_BLOCKS FOLDER      measures in a process of its own, prints JSON

Chains of 256 blocks (8,192 tokens) in extents of five, as 8 MB of the default model's KV are; one chain in four
branches off another one in its middle.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from cache.disk_worker import DiskConfig
from cache.extent import ExtentHeader
from cache.hashing import TokenIds, chain_hashes
from cache.messages import LoadQuery, StoreOffer
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.index_db import IndexDb
from cache.tiers.memory import MemoryTier
from serving.bench.warehouse_io import BLOCK_SIZE, ROOT, SHAPE

CHAIN_BLOCKS = 256
BLOCKS_PER_EXTENT = 5
_BRANCH_EVERY = 4
_NUM_LOOKUPS = 1000
_BATCH = 20_000


@dataclass(frozen=True, slots=True)
class IndexFigures:
    """Measured with one number of blocks. Times in seconds."""

    num_blocks: int
    open_s: float
    bytes_per_block: float
    lookup_p50_s: float
    lookup_p99_s: float
    reserve_s: float
    """Of one store's bookkeeping: a new turn of four blocks on a chain that is there."""


def measure_index(num_blocks: int, folder: Path) -> IndexFigures:
    """Build an index, then open it in another process, where no memory of the building is left."""
    _build(num_blocks, folder)
    command = [sys.executable, "-m", "serving.bench.warehouse_index", str(num_blocks), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return IndexFigures(**json.loads(done.stdout))


def chain_tokens(number: int) -> TokenIds:
    """Tokens of one chain; every fourth begins as the one before."""
    token_ids = np.random.default_rng(number).integers(0, 49152, CHAIN_BLOCKS * BLOCK_SIZE, np.int32)
    if number % _BRANCH_EVERY == _BRANCH_EVERY - 1:
        half = len(token_ids) // 2
        token_ids[:half] = chain_tokens(number - 1)[:half]
    return token_ids


def _build(num_blocks: int, folder: Path) -> None:
    FileTier(folder).close()
    index = IndexDb(folder / "index.sqlite")
    headers: list[ExtentHeader] = []
    built = 0
    for number in range(num_blocks):  # more than enough
        token_ids = chain_tokens(number)
        hashes = chain_hashes(ROOT, token_ids, BLOCK_SIZE)
        first = CHAIN_BLOCKS // 2 if number % _BRANCH_EVERY == _BRANCH_EVERY - 1 else 0
        for begin in range(first, CHAIN_BLOCKS, BLOCKS_PER_EXTENT):
            end = min(begin + BLOCKS_PER_EXTENT, CHAIN_BLOCKS)
            parent = hashes[begin - 1] if begin else ROOT
            tokens = token_ids[begin * BLOCK_SIZE : end * BLOCK_SIZE]
            headers.append(ExtentHeader.make(ROOT, parent, hashes[begin:end], tokens, BLOCK_SIZE, SHAPE, begin))
        built += CHAIN_BLOCKS - first
        if len(headers) >= _BATCH or built >= num_blocks:
            index.add_complete(headers)
            headers.clear()
        if built >= num_blocks:
            break
    index.close()


def _measure(folder: Path) -> IndexFigures:
    memory = psutil.Process().memory_info
    before = memory().rss
    started = time.perf_counter()
    budgets = Budgets(1 << 34, 1 << 60, 0)
    store = NodeStore(NodeStoreConfig(budgets, DiskConfig(min_free_bytes=0)), MemoryTier(), FileTier(folder))
    open_s = time.perf_counter() - started
    num_blocks = store.stats().num_blocks
    bytes_per_block = (memory().rss - before) / num_blocks
    # Chains that share nothing: a second hit would have the node store look for files that are not there.
    alone = [number for number in range(num_blocks // CHAIN_BLOCKS) if number % _BRANCH_EVERY < _BRANCH_EVERY - 2]
    lookups = sorted(_lookup(store, number) for number in alone[:_NUM_LOOKUPS])
    reserve_s = statistics.median(_reserve(store, number) for number in alone[:100])
    store.close()
    return IndexFigures(
        num_blocks,
        open_s,
        bytes_per_block,
        lookups[len(lookups) // 2],
        lookups[int(len(lookups) * 0.99)],
        reserve_s,
    )


def _lookup(store: NodeStore, number: int) -> float:
    token_ids = chain_tokens(number)
    hashes = tuple(chain_hashes(ROOT, token_ids, BLOCK_SIZE))
    query = LoadQuery(ROOT, hashes, token_ids, BLOCK_SIZE, 0, "bench")
    started = time.perf_counter()
    grant = store.prepare_load(query)
    seconds = time.perf_counter() - started
    if grant.num_tokens != len(token_ids):
        raise ValueError(f"chain {number}: {grant.num_tokens} of {len(token_ids)} tokens were found")
    store.complete_load("bench")
    return seconds


def _reserve(store: NodeStore, number: int) -> float:
    token_ids = np.concatenate((chain_tokens(number), np.arange(4 * BLOCK_SIZE, dtype=np.int32) + number))
    hashes = tuple(chain_hashes(ROOT, token_ids, BLOCK_SIZE))
    offer = StoreOffer(ROOT, hashes, token_ids, BLOCK_SIZE, SHAPE, CHAIN_BLOCKS)
    started = time.perf_counter()
    grant = store.prepare_store(offer)
    seconds = time.perf_counter() - started
    store.abort_store(tuple(header.extent_id for header in grant.extents))
    return seconds


if __name__ == "__main__":
    json.dump(asdict(_measure(Path(sys.argv[2]))), sys.stdout)
