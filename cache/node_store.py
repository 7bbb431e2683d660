"""The node store: one node's warehouse, in process and without Ray.

It puts the ledger's decisions into effect on a dram tier and a disk tier. Every public method may be called
from any thread: decisions are made under one lock, bytes move outside it. One thread of its own writes
extents behind, deletes files, promotes, and lets the leases of dead owners lapse.

`cache.actor` wraps this object in a Ray actor; a script can use it as it is.
"""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cache.errors import ExtentCorrupt, StoreUnavailable
from cache.events import DeviceBlocks, Event, EventBatch, EventLog, ReplicaGone, ReplicaLoad, Tier
from cache.extent import ExtentHeader, Image, verify_image
from cache.hashing import BlockHash, iter_hashes
from cache.holdings import Place
from cache.ledger import Budgets, Drop, Ledger
from cache.messages import LoadGrant, LoadPiece, LoadQuery, StoreGrant, StoreOffer, StoreStats
from cache.tiers.interface import DiskTier, DramTier

logger = logging.getLogger("tokenloft.warehouse")


@dataclass(frozen=True, slots=True)
class NodeStoreConfig:
    """Limits of one node store; times in seconds."""

    budgets: Budgets
    min_free_bytes: int = 1 << 30
    """The disk tier stops growing when the file system has less than this free."""
    lease_ttl_s: float = 60.0
    store_wait_s: float = 5.0
    """How long an offer waits for another writer of the same blocks, or for room, before it is refused."""
    disk_retry_s: float = 5.0
    """After an I/O error the disk is tried again this often."""
    replica_ttl_s: float = 30.0
    """An engine that has not reported for this long is gone."""


class NodeStore:
    """See the module's docstring. `close` writes what is dirty; a killed one loses only that."""

    def __init__(
        self,
        config: NodeStoreConfig,
        dram: DramTier,
        disk: DiskTier | None,
        *,
        node_id: str = "local",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if disk is None:
            config = replace(config, budgets=replace(config.budgets, disk_bytes=0))
        self._config = config
        self._dram = dram
        self._disk = disk
        self._clock = clock
        self._changed = threading.Condition()
        self._events = EventLog(node_id, uuid.uuid4().hex, self._snapshot)
        self._ledger = Ledger(config.budgets, self._events.append, lease_ttl_s=config.lease_ttl_s)
        self._devices: dict[str, _Device] = {}
        self._removals: deque[_Removal] = deque()
        self._promotions: dict[str, None] = {}
        self._degraded: str | None = None
        self._retry_disk_at = 0.0
        self._is_closing = False
        self._num_recovered_blocks = self._recover()
        self._writer = threading.Thread(target=self._run_writer, name="tokenloft-write-behind", daemon=True)
        self._writer.start()

    def __repr__(self) -> str:
        return f"<NodeStore {self._events.node_id} {self._ledger!r} disk={self._disk!r}>"

    def __enter__(self) -> "NodeStore":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _recover(self) -> int:
        if self._disk is None:
            return 0
        with self._changed:
            for header in self._disk.recover():
                if not self._ledger.recover(header):
                    # An extent that could not be deleted, and whose blocks were stored again.
                    self._removals.append(_Removal(header.extent_id))
            self._apply(self._ledger.shrink_disk())
            return self._ledger.num_blocks

    # -- reading ------------------------------------------------------------------------------------

    def prepare_load(self, query: LoadQuery) -> LoadGrant:
        """Find and lease the stored continuation of a prompt."""
        with self._changed:
            places, num_tokens = self._ledger.prepare_load(query, self._clock())
            return LoadGrant(self._pieces(query, places, num_tokens), num_tokens)

    def _pieces(self, query: LoadQuery, places: list[Place], num_tokens: int) -> tuple[LoadPiece, ...]:
        pieces: list[LoadPiece] = []
        at = 0
        while at < len(places):
            extent, position = places[at]
            end = at + 1
            while end < len(places) and places[end] == (extent, position + end - at):
                end += 1
            first = query.first_block + at
            tokens = min((first + end - at) * query.block_size, num_tokens) - first * query.block_size
            tier = Tier.DRAM if extent.in_dram else Tier.DISK
            if tier is Tier.DISK and self._ledger.note_disk_hit(extent):
                self._promotions[extent.extent_id] = None
                self._changed.notify_all()
            pieces.append(
                LoadPiece(extent.extent_id, tier, first, tokens, position, self._source(extent.extent_id, tier))
            )
            at = end
        return tuple(pieces)

    def _source(self, extent_id: str, tier: Tier) -> object:
        if tier is Tier.DRAM:
            return self._dram.source(extent_id)
        assert self._disk is not None
        return self._disk.path(extent_id)

    def complete_load(self, owner: str) -> None:
        """End the leases of `owner`."""
        with self._changed:
            self._apply(self._ledger.complete_load(owner))
            self._changed.notify_all()

    def renew_lease(self, owner: str) -> None:
        """Keep the leases of `owner` for another lease time."""
        with self._changed:
            self._ledger.renew_lease(owner, self._clock())

    def read_image(self, extent_id: str, tier: Tier) -> Image | None:
        """The whole image, for a reader on another node; None if it has gone."""
        try:
            if tier is Tier.DRAM:
                return self._dram.get(extent_id)
            return self._disk.read(extent_id) if self._disk is not None else None
        except (KeyError, OSError, ExtentCorrupt, StoreUnavailable):
            return None

    def report_bad(self, extent_id: str, tier: Tier, reason: str) -> None:
        """A reader found an image corrupt or missing: quarantine it, so that it is a miss from now on."""
        with self._changed:
            drops = self._ledger.discard(extent_id, tier)
            if not drops:
                return
            self._ledger.counters["quarantined_extents"] += 1
            self._apply(drops, is_bad=True)
        logger.warning("quarantined extent %s in %s: %s", extent_id, tier.value, reason)

    # -- storing ------------------------------------------------------------------------------------

    def prepare_store(self, offer: StoreOffer) -> StoreGrant:
        """Reserve room for the blocks that are missing; waits for another writer of the same ones, or for room."""
        deadline = self._clock() + self._config.store_wait_s
        with self._changed:
            while True:
                decision = self._ledger.prepare_store(offer, self._clock())
                self._apply(decision.drops)
                if decision.granted or not (decision.is_busy or decision.is_full):
                    return StoreGrant(tuple(decision.granted), has_more=decision.has_more)
                # A full handoff budget empties only when its reader is done: that may be never, so don't wait.
                is_hopeless = decision.is_too_big or (decision.is_full and offer.handoff_owner is not None)
                left = deadline - self._clock()
                if left <= 0 or is_hopeless or self._is_closing:
                    reason = "another writer is busy with these blocks" if decision.is_busy else "no room"
                    self._ledger.counters["refused_stores"] += 1
                    return StoreGrant(refusal=reason)
                self._changed.wait(min(left, 0.5))

    def complete_store(self, extent_id: str, image: Image) -> bool:
        """Take the sealed image of a granted extent and make it visible.

        False if the grant has lapsed, or the dram tier could not take the image. A lapsed grant that
        somebody else has filled since counts as stored.
        """
        with self._changed:
            if not self._ledger.is_prepared(extent_id):
                return self._is_in_dram(extent_id)
        try:
            self._dram.put(extent_id, image)
        except MemoryError as error:
            logger.warning("extent %s could not be stored: %s", extent_id, error)
            self.abort_store((extent_id,))
            return False
        with self._changed:
            is_stored = self._ledger.complete_store(extent_id, self._clock()) or self._is_in_dram(extent_id)
            if not is_stored:
                self._dram.drop(extent_id)
            self._changed.notify_all()
            return is_stored

    def _is_in_dram(self, extent_id: str) -> bool:
        extent = self._ledger.find(extent_id)
        return extent is not None and (extent.in_dram or extent.is_promoting)

    def abort_store(self, extent_ids: tuple[str, ...]) -> None:
        """Give granted extents back unfilled."""
        with self._changed:
            for extent_id in extent_ids:
                self._ledger.abort_store(extent_id)
            self._changed.notify_all()

    # -- events -------------------------------------------------------------------------------------

    def report_engine(self, load: ReplicaLoad, blocks: DeviceBlocks | None) -> bool:
        """An engine tells its load and what changed in its pool.

        False if the engine was not known, after a restart or a long silence: changes alone then say too little,
        and it must tell all that its pool holds.
        """
        with self._changed:
            was_known = load.replica_id in self._devices
            device = self._devices.setdefault(load.replica_id, _Device(load, self._clock()))
            device.load, device.seen_at = load, self._clock()
            if blocks is not None:
                device.hashes.difference_update(iter_hashes(blocks.removed))
                device.hashes.update(iter_hashes(blocks.added))
                self._events.append(blocks)
            self._events.append(load)
            return was_known

    def forget_engine(self, replica_id: str) -> None:
        """An engine has left."""
        with self._changed:
            if self._devices.pop(replica_id, None) is not None:
                self._events.append(ReplicaGone(replica_id))

    def read_events(self, epoch: str | None, number: int, wait_s: float = 0.0) -> EventBatch:
        """See `EventLog.read`."""
        return self._events.read(epoch, number, wait_s)

    def _snapshot(self) -> list[Event]:
        with self._changed:
            events = self._ledger.snapshot()
            for replica_id, device in self._devices.items():
                events.append(device.load)
                events.append(DeviceBlocks(replica_id, b"".join(device.hashes), b""))
            return events

    # -- state --------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        with self._changed:
            ledger, budgets = self._ledger, self._config.budgets
            return StoreStats(
                node_id=self._events.node_id,
                directory=str(self._disk.directory) if self._disk is not None else None,
                state=f"degraded: {self._degraded}" if self._degraded else "ok",
                num_extents=ledger.num_extents,
                num_blocks=ledger.num_blocks,
                dram_bytes=ledger.used_bytes[Tier.DRAM],
                dram_budget_bytes=budgets.dram_bytes,
                disk_bytes=ledger.used_bytes[Tier.DISK],
                disk_budget_bytes=budgets.disk_bytes,
                handoff_bytes=ledger.handoff_bytes,
                handoff_budget_bytes=budgets.handoff_bytes,
                dirty_bytes=ledger.dirty_bytes,
                num_recovered_blocks=self._num_recovered_blocks,
                counters=dict(ledger.counters),
            )

    def check_integrity(self) -> None:
        """Raise AssertionError if the books are off."""
        with self._changed:
            self._ledger.check_integrity()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until everything stored is durable; False if it takes longer or the disk is down."""
        deadline = self._clock() + timeout_s
        with self._changed:
            while self._ledger.has_dirty and self._ledger.disk_accepts_writes:
                left = deadline - self._clock()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.5))
            return not self._ledger.has_dirty

    def close(self) -> None:
        """Write what is dirty, then give up the folder. Safe to call twice."""
        self.flush()
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
        self._writer.join()
        if self._disk is None:
            return
        try:
            self._disk.save_order(self._ledger.disk_order())
        except OSError as error:
            logger.warning("the order of use could not be saved: %s", error)
        self._disk.close()

    # -- the writer thread --------------------------------------------------------------------------

    def _apply(self, drops: list[Drop], *, is_bad: bool = False) -> None:
        """Dram at once, files later by the writer. Called under the lock."""
        for extent_id, tier in drops:
            if tier is Tier.DRAM:
                self._dram.drop(extent_id)
            else:
                self._removals.append(_Removal(extent_id, is_bad))
        if drops:
            self._changed.notify_all()

    def _run_writer(self) -> None:
        while True:
            with self._changed:
                self._expire()
                header, drops = self._ledger.next_write()
                self._apply(drops)
                removals = self._take_removals()
                promotion = next(iter(self._promotions), None)
                if header is None and promotion is None and not removals:
                    if self._is_closing:
                        return
                    self._changed.notify_all()  # a flush may wait for writes that have been given up
                    self._changed.wait(1.0)
                    continue
            # First of all: a full disk gets room by them, and an id must go before it may come again.
            for removal in removals:
                self._remove_file(removal)
            if header is not None:
                self._write(header)
            if promotion is not None:
                self._promote(promotion)

    def _take_removals(self) -> list["_Removal"]:
        """Files to remove now; none while the disk is down, or the writer would spin on them."""
        if self._degraded and self._clock() < self._retry_disk_at:
            return []
        removals = list(self._removals)
        self._removals.clear()
        return removals

    def _expire(self) -> None:
        now = self._clock()
        self._apply(self._ledger.expire(now))
        for replica_id, device in list(self._devices.items()):
            if now - device.seen_at > self._config.replica_ttl_s:
                del self._devices[replica_id]
                self._events.append(ReplicaGone(replica_id))
        if self._degraded and self._disk is not None and now >= self._retry_disk_at:
            self._ledger.disk_accepts_writes = True

    def _remove_file(self, removal: "_Removal") -> None:
        assert self._disk is not None
        with self._changed:
            extent = self._ledger.find(removal.extent_id)
            if extent is not None and extent.on_disk:
                return  # written again since
        try:
            if removal.is_bad:
                self._disk.quarantine(removal.extent_id)
            else:
                self._disk.delete(removal.extent_id)
        except OSError as error:
            with self._changed:
                self._removals.append(removal)
            self._disk_failed(error)

    def _write(self, header: ExtentHeader) -> None:
        assert self._disk is not None
        extent_id = header.extent_id
        try:
            if self._disk.free_bytes() < self._config.min_free_bytes + header.image_bytes:
                raise _LowSpace(f"less than {self._config.min_free_bytes >> 20} MiB free on the file system")
            self._disk.write(header, self._dram.get(extent_id))
        except KeyError:
            self._give_up_write(extent_id)  # found bad and dropped meanwhile
        except StoreUnavailable as lost:
            self.report_bad(extent_id, Tier.DRAM, str(lost))
            self._give_up_write(extent_id)
        except _LowSpace as low:
            self._give_up_write(extent_id)
            self._set_degraded(str(low))
        except OSError as error:
            with self._changed:
                self._ledger.write_failed(extent_id, retry=True)
            self._disk_failed(error)
        else:
            self._wrote(extent_id)

    def _give_up_write(self, extent_id: str) -> None:
        with self._changed:
            self._ledger.write_failed(extent_id, retry=False)
            self._changed.notify_all()

    def _wrote(self, extent_id: str) -> None:
        with self._changed:
            self._apply(self._ledger.written(extent_id))
            if self._degraded:
                logger.warning("the warehouse's disk works again")
            self._degraded = None
            self._ledger.disk_accepts_writes = True
            self._changed.notify_all()

    def _promote(self, extent_id: str) -> None:
        assert self._disk is not None
        with self._changed:
            del self._promotions[extent_id]
            drops = self._ledger.prepare_promote(extent_id)
            if drops is None:
                return
            self._apply(drops)
        bad: str | None = None
        succeeded = False
        try:
            image = self._disk.read(extent_id)
            verify_image(extent_id, image)
            self._dram.put(extent_id, image)
            succeeded = True
        except (FileNotFoundError, ExtentCorrupt) as error:
            bad = str(error)
        except (OSError, MemoryError) as error:
            logger.warning("extent %s could not be promoted: %s", extent_id, error)
        with self._changed:
            self._ledger.complete_promote(extent_id, succeeded=succeeded)
            self._changed.notify_all()
        if bad is not None:
            self.report_bad(extent_id, Tier.DISK, bad)

    def _disk_failed(self, error: OSError) -> None:
        with self._changed:
            self._ledger.disk_accepts_writes = False
            self._retry_disk_at = self._clock() + self._config.disk_retry_s
        self._set_degraded(str(error))

    def _set_degraded(self, reason: str) -> None:
        with self._changed:
            if self._degraded is None:
                logger.warning("the warehouse's disk tier is degraded: %s; serving goes on without it", reason)
            self._degraded = reason


@dataclass(frozen=True, slots=True)
class _Removal:
    """A file to delete, or to set aside because it is bad."""

    extent_id: str
    is_bad: bool = False


class _LowSpace(Exception):
    """The file system has less free space than the configuration wants kept."""


@dataclass(slots=True)
class _Device:
    """What one engine has reported."""

    load: ReplicaLoad
    seen_at: float
    hashes: set[BlockHash] = field(default_factory=set)
