"""The engine's side of the warehouse: find blocks, read and verify them, store new ones.

Runs in the engine's process but never in its step loop. Images in dram are read through whatever the
tier hands out (an array, a Ray object); files of the same node are read by this process itself, straight
into aligned memory. Every block is verified before it is passed on: fingerprint, token ids, checksum.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from cache.errors import ExtentCorrupt, StoreUnavailable
from cache.events import DeviceBlocks, ReplicaLoad, Tier
from cache.extent import ExtentHeader, Image, SealedHeader, aligned_empty, allocate_image, parse_header, seal
from cache.hashing import TOKEN_BYTES, pack_tokens
from cache.messages import LoadGrant, LoadPiece, LoadQuery, StoreGrant, StoreOffer
from cache.tiers.disk import read_all, read_sealed_header


class StorePort(Protocol):
    """The node store's verbs as a client calls them: the object itself, or a Ray actor behind an adapter.

    Every method may raise StoreUnavailable.
    """

    def prepare_load(self, query: LoadQuery) -> LoadGrant: ...
    def complete_load(self, owner: str) -> None: ...
    def renew_lease(self, owner: str) -> None: ...
    def read_image(self, extent_id: str, tier: Tier) -> Image | None: ...
    def report_bad(self, extent_id: str, tier: Tier, reason: str) -> None: ...
    def prepare_store(self, offer: StoreOffer) -> StoreGrant: ...
    def complete_store(self, extent_id: str, image: Image) -> bool: ...
    def abort_store(self, extent_ids: tuple[str, ...]) -> None: ...
    def report_engine(self, load: ReplicaLoad, blocks: DeviceBlocks | None) -> bool: ...
    def forget_engine(self, replica_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Block:
    """One verified block, ready to be copied into the pool."""

    index: int
    """Position in the prompt, in blocks."""
    num_tokens: int
    """Tokens of the prompt that it covers, from its start."""
    stored_tokens: int
    """Tokens in `payload`, at least `num_tokens`."""
    payload: Image
    """`(num_layers, 2, stored_tokens, num_kv_heads, head_dim)` as bytes; valid until the next block is asked for."""
    tier: Tier


@dataclass(slots=True)
class TierSpeed:
    """Bytes read from one tier and the time it took, in all."""

    num_bytes: int = 0
    seconds: float = 0.0


@dataclass
class WarehouseClient:
    """Reads from and writes to one node store. Not thread-safe; give each thread its own.

    `fetch` turns a dram piece's source into an image; `is_local` says whether the store's files can be
    opened by this process.
    """

    port: StorePort
    fetch: Callable[[Any], Image] = field(default=lambda source: source)
    is_local: bool = True
    speeds: dict[Tier, TierSpeed] = field(default_factory=dict)
    _buffer: Image = field(default_factory=lambda: aligned_empty(0))

    # -- reading ------------------------------------------------------------------------------------

    def lookup(self, query: LoadQuery) -> LoadGrant:
        """Find and lease; end the lease with `release`."""
        return self.port.prepare_load(query)

    def release(self, owner: str) -> None:
        """End all leases of `owner`; a store that is gone has none."""
        try:
            self.port.complete_load(owner)
        except StoreUnavailable:
            return

    def read(self, query: LoadQuery, grant: LoadGrant) -> Iterator[Block]:
        """The granted blocks in order. Stops early, without an error, at the first one that can't be had."""
        for piece in grant.pieces:
            try:
                yield from self._read_piece(query, piece)
            except (ExtentCorrupt, OSError) as error:
                self._report_bad(piece, str(error))
                return
            except StoreUnavailable:
                return

    def _report_bad(self, piece: LoadPiece, reason: str) -> None:
        try:
            self.port.report_bad(piece.extent_id, piece.tier, reason)
        except StoreUnavailable:
            return

    def _read_piece(self, query: LoadQuery, piece: LoadPiece) -> Iterator[Block]:
        started = time.perf_counter()
        image, offset, sealed = self._fetch_piece(query, piece)
        num_bytes = 0
        for at in range(-(-piece.num_tokens // query.block_size)):
            index = piece.index_in_extent + at
            begin, end = sealed.header.block_range(index)
            payload = image[begin - offset : end - offset]
            num_tokens = min(query.block_size, piece.num_tokens - at * query.block_size)
            verify_block(sealed, index, payload, query, piece.first_block + at, num_tokens)
            num_bytes += len(payload)
            stored_tokens = len(sealed.header.block_tokens(index)) // TOKEN_BYTES
            yield Block(piece.first_block + at, num_tokens, stored_tokens, payload, piece.tier)
        speed = self.speeds.setdefault(piece.tier, TierSpeed())
        speed.num_bytes += num_bytes
        speed.seconds += time.perf_counter() - started

    def _fetch_piece(self, query: LoadQuery, piece: LoadPiece) -> tuple[Image, int, SealedHeader]:
        """Bytes that hold the piece's blocks, their offset in the image, and the image's header."""
        if piece.tier is Tier.DISK and self.is_local:
            return self._read_file(query, piece)
        if piece.tier is Tier.DRAM:
            image = self.fetch(piece.source)
        else:
            remote = self.port.read_image(piece.extent_id, piece.tier)
            if remote is None:
                raise ExtentCorrupt("the extent has gone")
            image = remote
        return image, 0, parse_header(image)

    def _read_file(self, query: LoadQuery, piece: LoadPiece) -> tuple[Image, int, SealedHeader]:
        fd = os.open(piece.source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            sealed = read_sealed_header(fd)
            last = piece.index_in_extent + -(-piece.num_tokens // query.block_size) - 1
            if last >= sealed.header.num_blocks:
                raise ExtentCorrupt("the extent has fewer blocks than its index says")
            begin, _ = sealed.header.block_range(piece.index_in_extent)
            _, end = sealed.header.block_range(last)
            if len(self._buffer) < end - begin:
                self._buffer = aligned_empty(end - begin)
            target = self._buffer[: end - begin]
            read_all(fd, target, begin)
            return target, begin, sealed
        finally:
            os.close(fd)

    # -- storing ------------------------------------------------------------------------------------

    def store(self, offer: StoreOffer, fill: Callable[[ExtentHeader, Image], None]) -> bool:
        """Store what is missing of a chain; `fill` copies an extent's blocks into the image's payload.

        True if everything offered is now stored; False if the store refused some of it. Raises
        StoreUnavailable; whatever `fill` raises gives the reservations back.
        """
        stored: set[str] = set()
        while True:
            grant = self.port.prepare_store(offer)
            if not self._fill(grant, stored, fill):
                return False
            if not grant.extents or not grant.has_more:
                return grant.refusal is None

    def _fill(self, grant: StoreGrant, stored: set[str], fill: Callable[[ExtentHeader, Image], None]) -> bool:
        """Fill and complete what was granted; False if an extent did not stay, then the rest is given back."""
        waiting = [header.extent_id for header in grant.extents]
        try:
            for header in grant.extents:
                if header.extent_id in stored:  # evicted again already: the chain is larger than the store
                    return False
                image = allocate_image(header)
                fill(header, image)
                seal(header, image)
                if not self.port.complete_store(header.extent_id, image):
                    return False
                stored.add(waiting.pop(0))
            return True
        finally:
            if waiting:
                self._abort(tuple(waiting))

    def _abort(self, extent_ids: tuple[str, ...]) -> None:
        try:
            self.port.abort_store(extent_ids)
        except StoreUnavailable:
            return  # the reservations lapse by themselves


def verify_block(
    sealed: SealedHeader, index: int, payload: Image, query: LoadQuery, block_index: int, num_tokens: int
) -> None:
    """Raise ExtentCorrupt unless this is the block that the prompt continues with, to the bit."""
    header = sealed.header
    if header.root_hash != query.root_hash:
        raise ExtentCorrupt("the extent belongs to another fingerprint")
    if header.block_size != query.block_size or index >= header.num_blocks:
        raise ExtentCorrupt("the extent has other blocks than its index says")
    parent = header.block_hash(index - 1) if index else header.parent_hash
    expected = query.block_hashes[block_index - 1] if block_index else query.root_hash
    if parent != expected:
        raise ExtentCorrupt("the block follows another history")
    start = block_index * query.block_size
    wanted = pack_tokens(query.token_ids[start : start + num_tokens])
    if not header.block_tokens(index).startswith(wanted):
        raise ExtentCorrupt("the block holds other tokens")
    sealed.verify_block(index, payload)
