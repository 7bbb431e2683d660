"""What happens to files on real disks and by careless hands: flipped bits, cut ends, swapped and edited content.

Each kind takes whole files and gives their new content; a `Store` makes it happen to many extents at once and
knows which damages a reader can notice: those that changed a byte that means something.
"""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import xxhash

from cache.client import WarehouseClient
from cache.encryption import Vault
from cache.extent import ExtentHeader, front_bytes
from cache.messages import LoadQuery
from cache.node_store import NodeStore
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.aftermath import Aftermath, fill_true, read_true
from tests.cache.chains import BLOCK_SIZE, budgets, offer, query, store_config

BLOCKS = 3
_PREFIX_BYTES = struct.calcsize("<8sIIQ")

Damage = Callable[[random.Random, ExtentHeader, bytes], bytes]


def flip_bit(rng: random.Random, header: ExtentHeader, content: bytes) -> bytes:
    at, damaged = rng.randrange(len(content)), bytearray(content)
    damaged[at] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def flip_bit_that_counts(rng: random.Random, header: ExtentHeader, content: bytes) -> bytes:
    """Header or payload; between them lies padding."""
    num_front = front_bytes(content)
    at = rng.randrange(num_front + header.payload_bytes)
    damaged = bytearray(content)
    damaged[at if at < num_front else header.payload_offset + at - num_front] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def overwrite(rng: random.Random, header: ExtentHeader, content: bytes) -> bytes:
    """A sector of garbage, or of zeros."""
    at, size = rng.randrange(len(content)), rng.choice((8, 512, 4096))
    garbage = rng.choice((bytes(size), rng.randbytes(size)))
    return (content[:at] + garbage + content[at + size :])[: len(content)]


def cut(rng: random.Random, header: ExtentHeader, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def lengthen(rng: random.Random, header: ExtentHeader, content: bytes) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 5000))


def swap_blocks(rng: random.Random, header: ExtentHeader, content: bytes) -> bytes:
    """Two blocks change places; a single one is turned inside."""
    if header.num_blocks < 2:
        (begin, end), middle = header.block_range(0), header.payload_offset + header.payload_bytes // 2
        return content[:begin] + content[middle:end] + content[begin:middle] + content[end:]
    i, j = rng.sample(range(header.num_blocks), 2)
    damaged = bytearray(content)
    (a, b), (c, d) = header.block_range(i), header.block_range(j)
    damaged[a:b], damaged[c:d] = content[c:d], content[a:b]
    return bytes(damaged)


def shift(rng: random.Random, header: ExtentHeader, content: bytes) -> bytes:
    """A part is written in the wrong place."""
    size = rng.choice((64, 256, 512))
    source, target = rng.randrange(len(content) - size), rng.randrange(len(content) - size)
    return content[:target] + content[source : source + size] + content[target + size :]


def edit_header(rng: random.Random, header: ExtentHeader, content: bytes) -> bytes:
    """One field says something else, and the header's checksum is right again."""
    num_front = front_bytes(content)
    fields = msgpack.unpackb(content[_PREFIX_BYTES:num_front])
    name = rng.choice(sorted(fields))
    fields[name] = _edited(rng, fields[name])
    packed: bytes = msgpack.packb(fields)
    magic, version, _, _ = struct.unpack("<8sIIQ", content[:_PREFIX_BYTES])
    front = struct.pack("<8sIIQ", magic, version, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed
    return front + content[len(front) :]


def _edited(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bytes):
        at = rng.randrange(len(value))
        return rng.choice((value[:at], value + value[:at], value[:at] + bytes([value[at] ^ 4]) + value[at + 1 :], b""))
    if isinstance(value, str):
        return rng.choice(("float16", "int8", "", "bfloat16", "nonsense"))
    if isinstance(value, list):
        return rng.choice((value[::-1], value[1:], [*value[:-1], _edited(rng, value[-1])], []))
    return rng.choice((0, -1, value + 1, value * 2, 1 << 31, 1 << 62, None, "1"))


KINDS: dict[str, Damage] = {
    "bit flips": flip_bit,
    "bit flips in header or payload": flip_bit_that_counts,
    "overwritten sectors": overwrite,
    "truncations": cut,
    "longer files": lengthen,
    "swaps of blocks": swap_blocks,
    "misplaced writes": shift,
    "edited headers": edit_header,
}
SWAP = "swaps of files"


@dataclass(frozen=True, eq=False)
class Target:
    """An extent's file and how to ask for just its blocks."""

    path: Path
    header: ExtentHeader
    content: bytes
    asked: LoadQuery

    def is_harmed_by(self, content: bytes) -> bool:
        """A byte that means something has changed: the header's or the payload's."""
        num_front, payload = front_bytes(self.content), self.header.payload_offset
        return content[:num_front] != self.content[:num_front] or content[payload:] != self.content[payload:]


class Store:
    """A closed folder of `num_chains` chains of five extents, that can be damaged, read and mended again."""

    def __init__(self, folder: Path, num_chains: int, vault: Vault | None = None) -> None:
        self.folder = folder
        self._vault = vault
        chains = [[chain * 1000 + i for i in range(4 * BLOCKS * BLOCK_SIZE + 2)] for chain in range(1, num_chains + 1)]
        with self.open() as store:
            for tokens in chains:
                assert WarehouseClient(store).store(offer(tokens), fill_true)
            assert store.flush()
            headers = [extent.header for extent in store._ledger.held]
        by_start = {tokens[0]: tokens for tokens in chains}
        self.targets = [self._target(header, by_start) for header in headers]
        self.index = (folder / "index.sqlite").read_bytes()
        self._spoilt: set[Target] = set()

    def _target(self, header: ExtentHeader, chains: dict[int, list[int]]) -> Target:
        tokens = chains[int(header.token_ids[0]) // 1000 * 1000]
        end = header.first_block * BLOCK_SIZE + header.num_tokens
        name = header.extent_id if self._vault is None else self._vault.name_of(header.extent_id)
        path = Path(f"{self.folder}/extents/{name[:2]}/{name[2:4]}/{name}.kv")
        return Target(path, header, path.read_bytes(), query(tokens[:end], first=header.first_block))

    def open(self) -> NodeStore:
        limits = budgets(dram=1 << 24, disk=1 << 30, blocks=BLOCKS)
        disk = FileTier(self.folder, fsync=False, lock_wait_s=0.0, vault=self._vault)
        return NodeStore(store_config(limits), MemoryTier(), disk)

    def mend(self) -> None:
        """All is as it was after the first close."""
        for target in self._spoilt:
            target.path.write_bytes(target.content)
        self._spoilt.clear()
        for path in (self.folder / "quarantine").iterdir():
            path.unlink()
        for path in self.folder.glob("index.sqlite*"):
            path.unlink()
        (self.folder / "index.sqlite").write_bytes(self.index)

    def spoil(self, target: Target, content: bytes) -> None:
        self._spoilt.add(target)
        target.path.write_bytes(content)

    def read_all(self, found: Aftermath) -> set[Target]:
        """Read every extent by itself; returns those that were not given in full."""
        missed: set[Target] = set()
        with self.open() as store:
            client = WarehouseClient(store, vault=self._vault)
            for target in self.targets:
                if read_true(client, target.asked, found) < target.header.num_tokens:
                    missed.add(target)
            store.check_integrity()
        self._spoilt |= missed
        return missed


def spoil_many(store: Store, rng: random.Random, num_damages: int) -> dict[Target, tuple[str, bool]]:
    """One damage each to as many extents; returns its kind, and whether a reader must notice it."""
    done: dict[Target, tuple[str, bool]] = {}
    targets = rng.sample(store.targets, num_damages)
    while targets:
        target = targets.pop()
        kind = rng.choice((*KINDS, SWAP))
        if kind == SWAP and targets:
            other = targets.pop()
            store.spoil(target, other.content)
            store.spoil(other, target.content)
            done[target] = done[other] = (SWAP, True)
            continue
        kind = rng.choice(list(KINDS)) if kind == SWAP else kind
        content = KINDS[kind](rng, target.header, target.content)
        store.spoil(target, content)
        must_notice = target.is_harmed_by(content) and kind != "edited headers"
        done[target] = (kind, must_notice)
    return done


def spoil_index(rng: random.Random, content: bytes) -> bytes:
    """Any of the damages of `KINDS` that do not need a header, to the index's only file."""
    at = rng.randrange(len(content))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        size = rng.choice((16, 512, 4096))
        return (content[:at] + rng.choice((bytes(size), rng.randbytes(size))) + content[at + size :])[: len(content)]
    damaged = np.frombuffer(content, np.uint8).copy()
    for _ in range(rng.choice((1, 1, 20))):
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return damaged.tobytes()
