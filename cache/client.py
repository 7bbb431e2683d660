"""The engine's side of the warehouse: find blocks, read and verify them, store new ones.

Runs in the engine's process but never in its step loop. Images in dram are read through whatever the
tier hands out (an array, a Ray object); files of the same node are read by this process itself, straight
into aligned memory. Every block is verified before it is passed on: fingerprint, token ids, checksum.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from cache.errors import ExtentCorrupt, ReadTimedOut, StoreUnavailable
from cache.events import DeviceBlocks, ReplicaLoad, Tier
from cache.extent import ExtentHeader, Image, SealedHeader, allocate_image, parse_header, seal
from cache.hashing import TOKEN_BYTES, pack_tokens
from cache.messages import LoadGrant, LoadPiece, LoadQuery, StoreGrant, StoreOffer
from cache.read_ahead import Chunk, ReadAhead

READ_TIMEOUT_S = 5.0
NUM_IN_FLIGHT = 4
"""Images of another node that are on their way while one is being verified."""


class StorePort(Protocol):
    """The node store's verbs as a client calls them: the object itself, or a Ray actor behind an adapter.

    Every method may raise StoreUnavailable.
    """

    def prepare_load(self, query: LoadQuery) -> LoadGrant: ...
    def complete_load(self, owner: str) -> None: ...
    def renew_lease(self, owner: str) -> None: ...
    def request_image(self, extent_id: str, tier: Tier) -> Any: ...
    def report_bad(self, extent_id: str, tier: Tier, reason: str) -> None: ...
    def report_hang(self, reason: str) -> None: ...
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
    prefetch: Callable[[Any], None] = field(default=lambda source: None)
    """Starts to bring a dram piece's source from another node."""
    read_timeout_s: float = READ_TIMEOUT_S
    """A disk that gives nothing for this long counts as a miss."""
    speeds: dict[Tier, TierSpeed] = field(default_factory=dict)
    _files_again_at: float = -math.inf

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
        files = [piece for piece in grant.pieces if self._is_file(piece)] if self._may_read_files() else []
        ahead = ReadAhead(files, query.block_size, self.read_timeout_s)
        images = self._images_ahead([piece for piece in grant.pieces if not self._is_file(piece)])
        try:
            for piece in grant.pieces:
                if not self._is_file(piece):
                    yield from self._read_image(query, piece, images)
                elif files:
                    yield from self._read_file(query, piece, ahead)
                else:
                    return
        except (ExtentCorrupt, OSError) as error:
            with suppress(StoreUnavailable):
                self.port.report_bad(piece.extent_id, piece.tier, str(error))
        except ReadTimedOut as hang:
            self._files_again_at = time.monotonic() + self.read_timeout_s
            with suppress(StoreUnavailable):
                self.port.report_hang(str(hang))
        except StoreUnavailable:
            return
        finally:
            ahead.close()

    def _is_file(self, piece: LoadPiece) -> bool:
        return piece.tier is Tier.DISK and self.is_local

    def _may_read_files(self) -> bool:
        """Not for a moment after the disk did not answer: each try would cost the time limit again."""
        return time.monotonic() >= self._files_again_at

    def _read_file(self, query: LoadQuery, piece: LoadPiece, ahead: ReadAhead) -> Iterator[Block]:
        started = time.perf_counter()
        for chunk in ahead.chunks(piece):
            yield from self._verified(query, piece, chunk)
        self._note_speed(piece, chunk.sealed, started)

    def _read_image(self, query: LoadQuery, piece: LoadPiece, images: Iterator[Image]) -> Iterator[Block]:
        started = time.perf_counter()
        image = next(images)
        sealed = parse_header(image)
        num_blocks = -(-piece.num_tokens // query.block_size)
        yield from self._verified(query, piece, Chunk(sealed, piece.index_in_extent, num_blocks, 0, image, image))
        self._note_speed(piece, sealed, started)

    def _images_ahead(self, pieces: Sequence[LoadPiece]) -> Iterator[Image]:
        """Images that are not read from files, those of another node a few requests ahead."""
        num_ahead = 0 if self.is_local else NUM_IN_FLIGHT
        waiting: deque[Any] = deque()
        for at in range(len(pieces)):
            waiting.extend(self._request(coming) for coming in pieces[at + len(waiting) : at + num_ahead + 1])
            source = waiting.popleft()
            if isinstance(source, StoreUnavailable):  # its turn has come: those before it could still be had
                raise source
            yield self.fetch(source)

    def _request(self, piece: LoadPiece) -> Any:
        """What `fetch` turns into the image, on its way already; or why it can't be had."""
        if piece.tier is not Tier.DRAM:
            try:
                return self.port.request_image(piece.extent_id, piece.tier)
            except StoreUnavailable as gone:
                return gone
        if not self.is_local:
            self.prefetch(piece.source)
        return piece.source

    def _verified(self, query: LoadQuery, piece: LoadPiece, chunk: Chunk) -> Iterator[Block]:
        header = chunk.sealed.header
        for index in range(chunk.index_in_extent, chunk.index_in_extent + chunk.num_blocks):
            at = index - piece.index_in_extent
            begin, end = header.block_range(index)
            payload = chunk.content[begin - chunk.offset : end - chunk.offset]
            num_tokens = min(query.block_size, piece.num_tokens - at * query.block_size)
            verify_block(chunk.sealed, index, payload, query, piece.first_block + at, num_tokens)
            stored_tokens = len(header.block_tokens(index)) // TOKEN_BYTES
            yield Block(piece.first_block + at, num_tokens, stored_tokens, payload, piece.tier)

    def _note_speed(self, piece: LoadPiece, sealed: SealedHeader, started: float) -> None:
        """Bandwidths are those of this node's own tiers."""
        if self.is_local:
            last = piece.index_in_extent - (-piece.num_tokens // sealed.header.block_size) - 1
            begin, end = sealed.header.block_range(piece.index_in_extent)[0], sealed.header.block_range(last)[1]
            speed = self.speeds.setdefault(piece.tier, TierSpeed())
            speed.num_bytes += end - begin
            speed.seconds += time.perf_counter() - started

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
