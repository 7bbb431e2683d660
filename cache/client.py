"""The engine's side of the warehouse: find blocks, read and verify them, store new ones.

Runs in the engine's process but never in its step loop. Images in dram are read through whatever the
tier hands out (an array, a Ray object); files of the same node are read by this process itself, straight
into aligned memory. Every block is verified before it is passed on: fingerprint, token ids, checksum.
"""

import errno
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

from cache.encryption import Vault
from cache.errors import ExtentCorrupt, ExtentLocked, ReadTimedOut, StoreUnavailable
from cache.events import DeviceBlocks, ReplicaLoad, Tier
from cache.extent import ExtentHeader, Image, allocate_image, seal
from cache.messages import LoadGrant, LoadPiece, LoadQuery, StoreGrant, StoreOffer
from cache.read_ahead import Block, ReadAhead

READ_TIMEOUT_S = 5.0
RENEW_INTERVAL_S = 15.0
"""A quarter of the time that a lease lasts."""
_OWN_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors that tell of this process or machine, and nothing of the file."""
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
    def report_unreadable(self, extent_id: str) -> None: ...
    def report_hang(self, reason: str) -> None: ...
    def prepare_store(self, offer: StoreOffer) -> StoreGrant: ...
    def complete_store(self, extent_id: str, image: Image) -> bool: ...
    def abort_store(self, extent_ids: tuple[str, ...]) -> None: ...
    def report_engine(self, load: ReplicaLoad, blocks: DeviceBlocks | None) -> bool: ...
    def forget_engine(self, replica_id: str) -> None: ...


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
    vault: Vault | None = None
    """Decrypts files. Those that it has no key for are misses."""
    speeds: dict[Tier, TierSpeed] = field(default_factory=dict)
    _files_again_at: float = -math.inf
    _renew_at: float = math.inf

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

    def read(self, query: LoadQuery, grant: LoadGrant, *, backwards: bool = False) -> Generator[Block, None, None]:
        """The granted blocks in order, or from the last to the first.

        Stops early, without an error, at the first one that can't be had.
        """
        self._renew_at = time.monotonic() + RENEW_INTERVAL_S
        pieces = self._worth_trying(grant.pieces)
        if backwards:
            pieces = pieces[::-1]
        images = self._images_ahead([piece for piece in pieces if not self._is_file(piece)])
        ahead = ReadAhead(query, pieces, images, self._is_file, self.read_timeout_s, self.vault, backwards=backwards)
        try:
            for piece in pieces:
                self._renew(query.owner)
                started = time.perf_counter()
                for chunk in ahead.chunks(piece):
                    yield from chunk.blocks
                    self._note_speed(piece.tier, chunk.num_bytes, time.perf_counter() - started)
                    started = time.perf_counter()
        except (ExtentCorrupt, FileNotFoundError) as error:
            with suppress(StoreUnavailable):
                self.port.report_bad(piece.extent_id, piece.tier, str(error))
        except OSError as error:
            if error.errno in _OWN_LIMITS:
                return  # a good file must not be suspected for it
            with suppress(StoreUnavailable):
                self.port.report_unreadable(piece.extent_id)
        except ReadTimedOut as hang:
            self._files_again_at = time.monotonic() + self.read_timeout_s
            with suppress(StoreUnavailable):
                self.port.report_hang(str(hang))
        except (ExtentLocked, StoreUnavailable):
            return
        finally:
            ahead.close()

    def _renew(self, owner: str) -> None:
        """A slow load keeps what it is still to read."""
        if time.monotonic() >= self._renew_at:
            self._renew_at = time.monotonic() + RENEW_INTERVAL_S
            self.port.renew_lease(owner)

    def _is_file(self, piece: LoadPiece) -> bool:
        return piece.tier is Tier.DISK and self.is_local

    def _worth_trying(self, pieces: Sequence[LoadPiece]) -> Sequence[LoadPiece]:
        """No files for a moment after the disk did not answer: each try would cost the time limit again."""
        if time.monotonic() >= self._files_again_at:
            return pieces
        return list(takewhile(lambda piece: not self._is_file(piece), pieces))

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

    def _note_speed(self, tier: Tier, num_bytes: int, seconds: float) -> None:
        """Bandwidths are those of this node's own tiers, with the copy of whoever reads."""
        if self.is_local:
            speed = self.speeds.setdefault(tier, TierSpeed())
            speed.num_bytes += num_bytes
            speed.seconds += seconds

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
