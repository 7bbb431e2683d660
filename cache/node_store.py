"""The node store: one node's warehouse, in process and without Ray.

It puts the ledger's decisions into effect on a dram tier and a disk tier. Every public method may be called
from any thread: decisions are made under one lock, bytes move outside it. `cache.disk_worker` moves them
between the tiers and lets the leases of dead owners lapse.

`cache.actor` wraps this object in a Ray actor; a script can use it as it is.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cache.collector import paused_collector
from cache.disk_worker import DiskConfig, DiskWorker
from cache.errors import ExtentCorrupt, StoreUnavailable
from cache.events import DeviceBlocks, Event, EventBatch, EventLog, ReplicaGone, ReplicaLoad, Tier
from cache.eviction import POLICIES, PolicyName
from cache.extent import Image
from cache.extent_tree import Run
from cache.hashing import BlockHash, iter_hashes
from cache.ledger import Ledger
from cache.messages import LoadGrant, LoadPiece, LoadQuery, PurgeQuery, PurgeReceipt, StoreGrant, StoreOffer, StoreStats
from cache.occupancy import Budgets
from cache.scrubber import Scrubber
from cache.steady_clock import SteadyClock
from cache.tiers.interface import DiskTier, DramTier

logger = logging.getLogger("tokenloft.warehouse")

PROMOTE_AT_HIT = 2
"""Reads from disk after which an extent has earned its place in dram."""


@dataclass(frozen=True, slots=True)
class NodeStoreConfig:
    """Limits of one node store; times in seconds."""

    budgets: Budgets
    disk: DiskConfig = field(default_factory=DiskConfig)
    lease_ttl_s: float = 60.0
    store_wait_s: float = 5.0
    """How long an offer waits for another writer of the same blocks, or for room, before it is refused."""
    replica_ttl_s: float = 30.0
    """An engine that has not reported for this long is gone."""
    scrub_bytes_per_s: float = 0.0
    """What is on disk is read again in the background at this rate, once a day; 0: it is not."""
    eviction: PolicyName = "reuse"
    """Which extents leave a full tier."""


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
        clock = SteadyClock(clock)
        self._config = config
        self._dram = dram
        self._disk = disk
        self._clock = clock
        self._changed = threading.Condition()
        self._events = EventLog(node_id, uuid.uuid4().hex, self._snapshot)
        self._ledger = Ledger(config.budgets, self._events.append, POLICIES[config.eviction], config.lease_ttl_s)
        self._devices: dict[str, _Device] = {}
        self._is_closed = False
        self._worker = DiskWorker(config.disk, self._ledger, self._changed, dram, disk, clock, self._expire)
        if disk is not None:
            with self._changed, paused_collector():
                self._worker.apply(self._ledger.disk.recover(disk.recover(), disk.recover_locked()))
        self._num_recovered_blocks = self._ledger.held.num_blocks
        self._worker.start()
        self._scrubber: Scrubber | None = None
        if disk is not None and config.scrub_bytes_per_s:
            rate = config.scrub_bytes_per_s
            self._scrubber = Scrubber(rate, self._ledger, self._changed, disk, self._worker, clock)
            self._scrubber.start()

    def __repr__(self) -> str:
        return f"<NodeStore {self._events.node_id} {self._ledger!r} disk={self._disk!r}>"

    def __enter__(self) -> "NodeStore":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- reading ------------------------------------------------------------------------------------

    def prepare_load(self, query: LoadQuery) -> LoadGrant:
        """Find and lease the stored continuation of a prompt."""
        with self._changed:
            runs = self._ledger.prepare_load(query, self._clock())
            if not runs:
                return LoadGrant()
            num_tokens = runs[-1].first_block * query.block_size + runs[-1].num_tokens
            return LoadGrant(tuple(self._pieces(runs)), num_tokens)

    def _pieces(self, runs: list[Run]) -> list[LoadPiece]:
        """Under the lock, and once for each of maybe hundreds of extents: hence no calls that can be spared."""
        in_dram = self._dram.source
        on_disk = self._disk.path if self._disk is not None else None
        piece_of = LoadPiece._make  # half the price of a call of the class
        pieces: list[LoadPiece] = []
        for extent, index_in_extent, first_block, num_tokens in runs:
            extent_id = extent.header.extent_id
            if extent.in_dram or on_disk is None:
                tier, source = Tier.DRAM, in_dram(extent_id)
            else:
                tier, source = Tier.DISK, on_disk(extent_id)
                extent.num_disk_hits += 1
                if extent.num_disk_hits >= PROMOTE_AT_HIT:
                    self._worker.promotions[extent_id] = None
                    self._changed.notify_all()
            pieces.append(piece_of((extent_id, tier, first_block, num_tokens, index_in_extent, source)))
        return pieces

    def complete_load(self, owner: str) -> None:
        """End the leases of `owner`."""
        with self._changed:
            self._worker.apply(self._ledger.complete_load(owner))
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

    def request_image(self, extent_id: str, tier: Tier) -> Image:
        """`read_image` for clients of this object. Raises StoreUnavailable if the image has gone."""
        image = self.read_image(extent_id, tier)
        if image is None:
            raise StoreUnavailable(f"extent {extent_id} has gone from {tier.value}")
        return image

    def report_hang(self, reason: str) -> None:
        """A reader's disk did not answer: write nothing to it until it does."""
        self._worker.suspend(reason)

    def report_unreadable(self, extent_id: str) -> None:
        """A reader got an error from the disk: the file is tried again, and set aside if it alone fails."""
        self._worker.suspect(extent_id)

    def report_bad(self, extent_id: str, tier: Tier, reason: str) -> None:
        """A reader found an image corrupt or missing: quarantine it, so that it is a miss from now on."""
        self._worker.quarantine(extent_id, tier, reason)

    # -- storing ------------------------------------------------------------------------------------

    def prepare_store(self, offer: StoreOffer) -> StoreGrant:
        """Reserve room for the blocks that are missing; waits for another writer of the same ones, or for room."""
        deadline = self._clock() + self._config.store_wait_s
        with self._changed:
            while True:
                self._worker.watch()
                decision = self._ledger.prepare_store(offer, self._clock())
                self._worker.apply(decision.drops)
                if decision.granted or not (decision.is_busy or decision.is_full):
                    return StoreGrant(tuple(decision.granted), has_more=decision.has_more)
                # A full handoff budget empties only when its reader is done: that may be never, so don't wait.
                is_hopeless = decision.is_too_big or (decision.is_full and offer.handoff_owner is not None)
                left = deadline - self._clock()
                if left <= 0 or is_hopeless or self._is_closed:
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
        extent = self._ledger.held.find(extent_id)
        return extent is not None and (extent.in_dram or extent.is_promoting)

    def abort_store(self, extent_ids: tuple[str, ...]) -> None:
        """Give granted extents back unfilled."""
        with self._changed:
            for extent_id in extent_ids:
                self._ledger.abort_store(extent_id)
            self._changed.notify_all()

    # -- purging ------------------------------------------------------------------------------------

    def purge(self, query: PurgeQuery, wait_s: float = 10.0) -> PurgeReceipt:
        """Delete what is meant from dram and disk, leased or not, and look whether anything is left."""
        deadline = self._clock() + wait_s
        with self._changed, self._worker.hurrying():
            purged = self._ledger.purge(query)
            self._worker.apply(purged.drops)
            ids = set(purged.extent_ids)
            while self._clock() < deadline and self._worker.is_busy_with(ids):
                self._changed.wait(0.05)
        try:
            if self._disk is not None:
                self._disk.forget_deleted()
        except OSError as error:
            logger.warning("traces of purged extents may be left in %s: %s", self._disk, error)
        return replace(purged.receipt, num_left=sum(self._is_left(extent_id) for extent_id in ids))

    def _is_left(self, extent_id: str) -> bool:
        with self._changed:
            if self._ledger.held.find(extent_id) is not None:
                return True
        return self._disk is not None and self._disk.holds(extent_id)

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
            events = self._ledger.held.snapshot()
            for replica_id, device in self._devices.items():
                events.append(device.load)
                events.append(DeviceBlocks(replica_id, b"".join(device.hashes), b""))
            return events

    # -- state --------------------------------------------------------------------------------------

    def stats(self) -> StoreStats:
        with self._changed:
            self._worker.watch()
            ledger, room, budgets = self._ledger, self._ledger.room, self._config.budgets
            return StoreStats(
                node_id=self._events.node_id,
                directory=str(self._disk.directory) if self._disk is not None else None,
                state=f"degraded: {self._worker.degraded}" if self._worker.degraded else "ok",
                num_extents=len(ledger.held),
                num_blocks=ledger.held.num_blocks,
                dram_bytes=room.used_bytes[Tier.DRAM],
                dram_budget_bytes=budgets.dram_bytes,
                disk_bytes=room.used_bytes[Tier.DISK],
                disk_budget_bytes=budgets.disk_bytes,
                handoff_bytes=room.handoff_bytes,
                handoff_budget_bytes=budgets.handoff_bytes,
                dirty_bytes=room.dirty_bytes,
                num_recovered_blocks=self._num_recovered_blocks,
                num_locked_extents=len(room.locked),
                num_extents_to_scrub=self._scrubber.num_left if self._scrubber is not None else 0,
                counters=dict(ledger.counters),
            )

    def check_integrity(self) -> None:
        """Raise AssertionError if the books are off."""
        with self._changed:
            self._ledger.check_integrity()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until everything stored is durable; False if it takes longer or the disk is down."""
        deadline = self._clock() + timeout_s
        with self._changed, self._worker.hurrying():
            while self._ledger.has_dirty and self._ledger.room.disk_accepts_writes:
                left = deadline - self._clock()
                if left <= 0:
                    return False
                self._worker.watch()
                self._changed.wait(min(left, 0.5))
            return not self._ledger.has_dirty

    def close(self) -> None:
        """Write what is dirty, then give up the folder. Safe to call twice."""
        self.flush()
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        if self._scrubber is not None:
            self._scrubber.close(self._config.disk.write_timeout_s)
        if not self._worker.close(self._config.disk.write_timeout_s):
            logger.warning("the warehouse's disk hangs: its folder is left as it is")
            return
        if self._disk is None:
            return
        try:
            self._disk.save_order(list(self._ledger.held.victims(Tier.DISK)))
        except OSError as error:
            logger.warning("the order of use could not be saved: %s", error)
        self._disk.close()

    def _expire(self) -> None:
        """Whatever time ends; under the lock."""
        now = self._clock()
        self._worker.apply(self._ledger.expire(now))
        for replica_id, device in list(self._devices.items()):
            if now - device.seen_at > self._config.replica_ttl_s:
                del self._devices[replica_id]
                self._events.append(ReplicaGone(replica_id))


@dataclass(slots=True)
class _Device:
    """What one engine has reported."""

    load: ReplicaLoad
    seen_at: float
    hashes: set[BlockHash] = field(default_factory=set)
