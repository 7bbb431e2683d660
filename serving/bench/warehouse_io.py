"""How fast KV goes to the warehouse and comes back, beside what the disk and the memory can do.

Commits through the disk tier, loads through the client into a pool, as engines do them; nothing is computed. What
each is held against runs in turn with it, on the same bytes in the same folder.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cache.client import WarehouseClient
from cache.disk_worker import DiskConfig
from cache.encryption import Vault
from cache.extent import ExtentHeader, Image, KVShape, allocate_image, chain_header, seal, split_into_extents
from cache.hashing import BlockHash, TokenIds, chain_hashes
from cache.messages import LoadGrant, LoadQuery, StoreOffer
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.files import Files
from cache.tiers.memory import MemoryTier
from serving.bench.report import Figure
from serving.engine.kv_pool import KVLayout, KVPool

BLOCK_SIZE = 32
ROOT = BlockHash(b"tokenloft bench.")
LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=BLOCK_SIZE, dtype="float32")
"""The default model's."""
SHAPE = KVShape(LAYOUT.num_layers, LAYOUT.num_kv_heads, LAYOUT.head_dim, LAYOUT.dtype)
EXTENT_BYTES = 8_000_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chain of full blocks with KV that fills a pool."""

    token_ids: TokenIds
    block_hashes: tuple[BlockHash, ...]
    pool: KVPool

    @classmethod
    def of(cls, num_tokens: int) -> "Prompt":
        token_ids = np.random.default_rng(0).integers(0, 49152, num_tokens, np.int32)
        pool = KVPool(LAYOUT, num_tokens // BLOCK_SIZE)
        pool.kv.normal_()
        return cls(token_ids, tuple(chain_hashes(ROOT, token_ids, BLOCK_SIZE)), pool)

    @property
    def num_blocks(self) -> int:
        return len(self.block_hashes)

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * LAYOUT.block_bytes

    def query(self) -> LoadQuery:
        return LoadQuery(ROOT, self.block_hashes, self.token_ids, BLOCK_SIZE, 0, "bench")

    def offer(self) -> StoreOffer:
        return StoreOffer(ROOT, self.block_hashes, self.token_ids, BLOCK_SIZE, SHAPE, 0)

    def fill(self, header: ExtentHeader, image: Image) -> None:
        blocks = [(header.first_block + at, BLOCK_SIZE) for at in range(header.num_blocks)]
        self.pool.export(blocks, image[header.payload_offset :])

    def images(self, extent_bytes: int) -> Iterator[tuple[ExtentHeader, Image]]:
        whole = chain_header(ROOT, self.block_hashes, self.token_ids, 0, self.num_blocks, BLOCK_SIZE, SHAPE)
        for header in split_into_extents(whole, extent_bytes):
            image = allocate_image(header)
            self.fill(header, image)
            seal(header, image)
            yield header, image


def measure_commit(folder: Path, prompt: Prompt, rounds: int) -> list[Figure]:
    """Extents of 8 MB made durable, beside plain files of the same bytes, in turn.

    In batches, as the disk's worker commits them by default while more is waiting, and one by one.
    """
    tier = FileTier(folder / "commit")
    images = list(prompt.images(EXTENT_BYTES))
    num_bytes = statistics.mean(len(image) for _, image in images)
    per_batch = max(1, DiskConfig().max_batch_bytes // EXTENT_BYTES)
    figures: list[Figure] = []
    for name, size in ((f"commit, {per_batch} extents at a time", per_batch), ("commit, one at a time", 1)):
        ours: list[float] = []
        plain: list[float] = []
        for _ in range(rounds):
            for first in range(0, len(images), size):
                batch = images[first : first + size]
                plain.append(_seconds(partial(_write_plainly, folder / "plain", batch)) / len(batch))
                ours.append(_seconds(partial(_commit, tier, batch)) / len(batch))
            for header, _ in images:
                tier.delete(header.extent_id)
            for path in folder.glob("plain-*"):
                path.unlink()
            os.sync()  # freeing the blocks would be paid by whichever side is next
        target = 0.85 if size > 1 else None
        figures.append(
            _bandwidth(name, num_bytes, statistics.median(ours), "write and fsync", statistics.median(plain), target)
        )
    tier.close()
    return figures


def _commit(tier: FileTier, batch: list[tuple[ExtentHeader, Image]]) -> None:
    for header, image in batch:
        tier.write(header, image)
    tier.commit()


def _write_plainly(path: Path, batch: list[tuple[ExtentHeader, Image]]) -> None:
    files = Files()
    for header, image in batch:
        target = path.with_name(f"{path.name}-{header.extent_id}")
        files.write(target, image.data)
        files.sync(target)


def measure_disk_loads(folder: Path, prompt: Prompt, rounds: int) -> list[Figure]:
    """A whole prompt from files into the pool, verified: with the page cache dropped, and from it."""
    with open_on_disk(folder / "loads", prompt) as store:
        client = WarehouseClient(store)
        grant = client.lookup(prompt.query())
        paths = [Path(piece.source) for piece in grant.pieces]
        buffer = bytearray(max(path.stat().st_size for path in paths))
        cold: list[float] = []
        plain: list[float] = []
        for _ in range(rounds):
            drop_page_cache(paths)
            plain.append(_seconds(lambda: read_plainly(paths, buffer)))
            drop_page_cache(paths)
            cold.append(_seconds(lambda: load(client, prompt, grant)))
        warm, memcpy = _beside_memcpy(lambda: load(client, prompt, grant), prompt.kv_bytes, rounds)
        client.release("bench")
    num_bytes = prompt.kv_bytes
    return [
        _bandwidth("load, cold disk", num_bytes, statistics.median(cold), "plain read", statistics.median(plain), 0.9),
        _bandwidth("load, page cache", num_bytes, warm, "memcpy", memcpy, 0.5),
    ]


@contextmanager
def open_on_disk(folder: Path, prompt: Prompt, vault: Vault | None = None) -> Iterator[NodeStore]:
    """A store that holds the prompt on disk only, encrypted with a vault, and promotes nothing."""
    room = 4 * prompt.kv_bytes
    disk = DiskConfig(min_free_bytes=0)
    with NodeStore(NodeStoreConfig(Budgets(room, room, 0), disk), MemoryTier(), FileTier(folder, vault=vault)) as store:
        if not WarehouseClient(store).store(prompt.offer(), prompt.fill) or not store.flush():
            raise OSError(f"the warehouse in {folder} did not take the prompt: {store.stats().state}")
    with NodeStore(NodeStoreConfig(Budgets(1, room, 0), disk), MemoryTier(), FileTier(folder, vault=vault)) as store:
        yield store


def measure_dram_load(client: WarehouseClient, prompt: Prompt, rounds: int) -> Figure:
    """A whole prompt from the dram tier of another process into the pool, verified."""
    if not client.store(prompt.offer(), prompt.fill):
        return Figure("load, dram of another process", None, "GB/s", reason="the node store did not take the prompt")
    grant = client.lookup(prompt.query())
    ours, memcpy = _beside_memcpy(lambda: load(client, prompt, grant), prompt.kv_bytes, rounds)
    client.release("bench")
    return _bandwidth("load, dram of another process", prompt.kv_bytes, ours, "memcpy", memcpy, 0.5)


def load(client: WarehouseClient, prompt: Prompt, grant: LoadGrant) -> None:
    """Into the pool, as the engine's loader does it. Raises ValueError if a block does not come."""
    num_blocks = 0
    for block in client.read(prompt.query(), grant):
        prompt.pool.import_(block.index, block.num_tokens, block.payload, block.stored_tokens)
        num_blocks += 1
    if num_blocks != prompt.num_blocks:
        raise ValueError(f"{num_blocks} of {prompt.num_blocks} blocks came back")


def _beside_memcpy(run: Callable[[], None], num_bytes: int, rounds: int) -> tuple[float, float]:
    """Median seconds of `run` and of copying as many bytes, in turn."""
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    run()
    ours: list[float] = []
    copies: list[float] = []
    for _ in range(rounds):
        copies.append(_seconds(lambda: np.copyto(target, source)))
        ours.append(_seconds(run))
    return statistics.median(ours), statistics.median(copies)


def drop_page_cache(paths: list[Path]) -> None:
    """Have the next read of these files, which are on the disk already, come from there."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_plainly(paths: list[Path], buffer: bytearray) -> None:
    """As fast as the disk gives them; each goes over the last one."""
    view = memoryview(buffer)
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            offset = 0
            while num_read := os.preadv(fd, [view[offset:]], offset):
                offset += num_read
                if offset == len(view):
                    break
        finally:
            os.close(fd)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _bandwidth(
    name: str, num_bytes: float, seconds: float, against: str, against_seconds: float, target: float | None
) -> Figure:
    value, limit = num_bytes / seconds / 1e9, num_bytes / against_seconds / 1e9
    return Figure(name, value, "GB/s", against=against, against_value=limit, target=target)
