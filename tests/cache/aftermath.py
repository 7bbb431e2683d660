"""What must hold of a warehouse's folder after its owner has died, looked at from outside.

A `Witness` says what was promised: which extents are durable, and which it was told to give up. `reopen` then
opens the folder as the next owner would and returns every promise that was broken, in words, so that a test
can ask for none, and a test of the tests for some.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cache.client import WarehouseClient
from cache.events import Tier
from cache.extent import ExtentHeader, Image
from cache.hashing import BlockHash
from cache.messages import LoadQuery
from cache.node_store import NodeStore
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import kv_of, query, sealed_image, store_config

_TRUE_IMAGES: dict[str, bytes] = {}


def true_image(header: ExtentHeader) -> bytes:
    """The only bytes that an extent's file may have."""
    key = f"{header.extent_id} {header.first_block} {header.origin}"
    if key not in _TRUE_IMAGES:
        _TRUE_IMAGES[key] = sealed_image(header).tobytes()
    return _TRUE_IMAGES[key]


@cache
def _true_block(parent: BlockHash, tokens: tuple[int, ...]) -> bytes:
    return kv_of(parent, np.array(tokens, "<i4")).tobytes()


def fill_true(header: ExtentHeader, image: Image) -> None:
    """As `chains.fill`, which it asks once for each block."""
    parent = header.parent_hash
    for index, block_hash in enumerate(header.block_hashes):
        begin, end = header.block_range(index)
        image[begin:end] = np.frombuffer(_true_block(parent, tuple(header.block_token_ids(index).tolist())), np.uint8)
        parent = block_hash


class Witness(FileTier):
    """Tells `+` and an extent's id once it is durable, and `-` before it is deleted, set aside or abandoned."""

    def __init__(self, directory: Path, tell: Callable[[str, str], None], **options: Any) -> None:
        self.tell = tell
        super().__init__(directory, **options)

    def commit(self) -> list[str]:
        committed = super().commit()
        for extent_id in committed:
            self.tell("+", extent_id)
        return committed

    def abandon(self) -> None:
        for extent_id in self._written:
            self.tell("-", extent_id)
        super().abandon()

    def delete(self, extent_id: str) -> None:
        self.tell("-", extent_id)
        super().delete(extent_id)

    def quarantine(self, extent_id: str) -> None:
        self.tell("-", extent_id)
        super().quarantine(extent_id)


@dataclass
class Promises:
    """What owners have said so far."""

    durable: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    """Purged, and the purge has ended: they must not come back."""

    def note(self, sign: str, extent_id: str) -> None:
        if sign == "+":
            self.durable.add(extent_id)
            self.forgotten.discard(extent_id)
        elif sign == "-":
            self.durable.discard(extent_id)

    def copy(self) -> "Promises":
        return Promises(set(self.durable), set(self.forgotten))


@dataclass
class Aftermath:
    """What the next owner found."""

    faults: list[str] = field(default_factory=list)
    num_checked: int = 0
    """Extents that were read back and compared."""
    num_unvouched: int = 0
    """Files that the index said nothing about."""
    num_tokens: int = 0
    """Read through the client."""

    def hear(self, message: str) -> None:
        if message.startswith("checking"):
            self.num_unvouched += int(message.split()[1])


class _Examined(Witness):
    """Compares all that the folder gives back, before anything is done with it."""

    def __init__(self, directory: Path, promises: Promises, found: Aftermath) -> None:
        self._promises, self._found = promises, found
        super().__init__(directory, promises.note, fsync=False, report=found.hear, lock_wait_s=5.0)

    def recover(self) -> list[ExtentHeader]:
        headers = super().recover()
        faults = self._found.faults
        for header in headers:
            path = Path(self.path(header.extent_id))
            if not path.exists():
                faults.append(f"listed without a file: {header.extent_id}")
            elif path.read_bytes() != true_image(header):
                faults.append(f"torn: {header.extent_id}")
        listed = {header.extent_id for header in headers}
        faults += [f"lost: {each}" for each in self._promises.durable - listed]
        faults += [f"came back: {each}" for each in self._promises.forgotten & listed]
        faults += [f"left over: {each}" for each in (self.directory / "tmp").iterdir()]
        faults += [f"not in the books: {each}" for each in files_in(self.directory) if each.stem not in listed]
        self._found.num_checked += len(headers)
        return headers


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.glob("extents/*/*/*") if path.exists()]


def reopen(folder: Path, promises: Promises, limits: Budgets, prompts: Iterable[list[int]] = ()) -> Aftermath:
    """Open a dead owner's folder, look at everything, read the prompts, close it."""
    found = Aftermath()
    with NodeStore(store_config(limits), MemoryTier(), _Examined(folder, promises, found)) as store:
        store.check_integrity()
        _settle(store)
        _compare_books(folder, store, found)
        client = WarehouseClient(store)
        for tokens in prompts:
            read_true(client, query(tokens), found)
        store.check_integrity()
    return found


def _settle(store: NodeStore) -> None:
    """Wait until what the folder held in excess has been deleted."""
    deadline = time.monotonic() + 30.0
    while store._worker._removals or store._worker._busy_since is not None:
        assert time.monotonic() < deadline, "the worker does not come to rest"
        time.sleep(0.0005)


def _compare_books(folder: Path, store: NodeStore, found: Aftermath) -> None:
    files = files_in(folder)
    stats = store.stats()
    num_bytes = sum(path.stat().st_size for path in files)
    if num_bytes != stats.disk_bytes:
        found.faults.append(f"{num_bytes} bytes on disk, {stats.disk_bytes} in the books")
    if stats.disk_bytes > stats.disk_budget_bytes:
        found.faults.append(f"{stats.disk_bytes} bytes on disk, allowed are {stats.disk_budget_bytes}")
    on_disk = {extent.extent_id for extent in store._ledger.held if extent.on_disk}
    if on_disk != {path.stem for path in files}:
        found.faults.append("the books and the folder hold other extents")


def read_true(client: WarehouseClient, asked: LoadQuery, found: Aftermath) -> int:
    """Read what is there; every byte that is not the true one is a fault. Returns the tokens read."""
    tokens = 0
    grant = client.lookup(asked)
    for block in client.read(asked, grant):
        start = block.index * asked.block_size
        parent = asked.block_hashes[block.index - 1] if block.index else asked.root_hash
        true = _true_block(parent, tuple(asked.token_ids[start : start + block.num_tokens].tolist()))
        if block.payload[: len(true)].tobytes() != true:
            found.faults.append(f"wrong bytes: block {block.index} of {asked.token_ids[:4]} from {block.tier}")
        tokens += block.num_tokens
        found.num_tokens += block.num_tokens
    client.release(asked.owner)
    return tokens


def on_disk_ids(store: NodeStore) -> set[str]:
    return {extent.extent_id for extent in store._ledger.held if extent.is_in(Tier.DISK)}
