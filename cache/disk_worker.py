"""What moves between a node store's tiers, on one thread of its own: writes, deletions, promotions.

The worker puts the ledger's decisions about the disk into effect and alone knows whether the disk works.
Decisions are made under the node store's lock, bytes move outside it. A disk that fails, fills up or hangs
degrades the tier: the reason is in `degraded`, nothing waits for it, and the first write that succeeds
again ends it.

    dirty extents --write--> temp files --commit, at most `commit_interval_s` later--> durable
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cache.errors import ExtentCorrupt, FolderError, StoreUnavailable
from cache.events import Tier
from cache.extent import ExtentHeader, verify_image
from cache.ledger import Ledger
from cache.occupancy import Drop
from cache.tiers.interface import DiskTier, DramTier

logger = logging.getLogger("tokenloft.warehouse")


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """Limits of the disk tier's worker; times in seconds."""

    min_free_bytes: int = 1 << 30
    """The disk tier stops growing when the file system has less than this free."""
    commit_interval_s: float = 0.0
    """Writes are made durable together, at most this long after the first; 0: each by itself."""
    max_batch_bytes: int = 64 << 20
    """And no later than this many bytes."""
    retry_s: float = 5.0
    """After an error the disk is tried again this often."""
    write_timeout_s: float = 10.0
    """A write that takes longer hangs: nothing waits for it any more."""


class DiskWorker:
    """See the module's docstring. Without a disk tier it only watches the clock."""

    def __init__(
        self,
        config: DiskConfig,
        ledger: Ledger,
        changed: threading.Condition,
        dram: DramTier,
        disk: DiskTier | None,
        clock: Callable[[], float],
        expire: Callable[[], None],
    ) -> None:
        """`changed` is the lock of all decisions; `expire` is called under it, about once a second."""
        self.degraded: str | None = None
        self.promotions: dict[str, None] = {}
        self._suspects: dict[str, None] = {}
        """Extents whose files a reader could not read: the file's fault, the disk's, or nobody's any more."""
        self._config = config
        self._ledger = ledger
        self._changed = changed
        self._dram = dram
        self._disk = disk
        self._clock = clock
        self._expire = expire
        self._removals: deque[_Removal] = deque()
        self._retry_at = 0.0
        self._probe_bytes = 0
        """Room that a probe must find."""
        self._is_closing = False
        self._num_hurrying = 0
        self._busy_since: float | None = None
        self._uncommitted_bytes = 0
        self._commit_at = 0.0
        self._thread = threading.Thread(target=self._run, name="tokenloft-disk", daemon=True)

    def __repr__(self) -> str:
        return f"<DiskWorker {self._disk!r} {self.degraded or 'ok'}, {len(self._removals)} to remove>"

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Finish what is under way. False if the disk hangs and the thread had to be left behind."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- from other threads, under the lock -----------------------------------------------------------

    def apply(self, drops: list[Drop], *, is_bad: bool = False) -> None:
        """Dram at once, files later by the thread."""
        for extent_id, tier in drops:
            if tier is Tier.DRAM:
                self._dram.drop(extent_id)
            else:
                self._removals.append(_Removal(extent_id, is_bad))
        if drops:
            self._changed.notify_all()

    @contextmanager
    def hurrying(self) -> Iterator[None]:
        """Somebody waits for the disk: once nothing more is to be written, a commit does not wait for its time."""
        self._num_hurrying += 1
        self._changed.notify_all()
        try:
            yield
        finally:
            self._num_hurrying -= 1

    def watch(self) -> None:
        """Notice a disk that hangs, and that time goes on although the thread does not."""
        since = self._busy_since
        if since is not None and self._clock() - since > self._config.write_timeout_s:
            self._degrade(f"the disk has not answered for {self._config.write_timeout_s:g} s")
            self._expire()

    def quarantine(self, extent_id: str, tier: Tier, reason: str) -> None:
        """An image is corrupt or missing: a miss from now on."""
        with self._changed:
            drops = self._ledger.discard(extent_id, tier)
            if not drops:
                return
            self._ledger.counters["quarantined_extents"] += 1
            self.apply(drops, is_bad=True)
        logger.warning("quarantined extent %s in %s: %s", extent_id, tier.value, reason)

    def suspect(self, extent_id: str) -> None:
        """A reader could not read a file: look whether that or the disk is bad."""
        with self._changed:
            self._suspects[extent_id] = None
            self._changed.notify_all()

    def suspend(self, reason: str) -> None:
        """Go on without the disk until it has answered again."""
        with self._changed:
            self._degrade(reason)

    def is_busy_with(self, extent_ids: set[str]) -> bool:
        """Something is still to be done with files of these extents."""
        if any(removal.extent_id in extent_ids for removal in self._removals):
            return True
        return self._busy_since is not None or any(each in extent_ids for each in self._ledger.room.writing)

    # -- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy_since = None
                self._expire()
                needs_probe = self.degraded is not None and self._clock() >= self._retry_at and not self._is_closing
                header, drops = self._ledger.disk.next_write()
                self.apply(drops)
                removals = self._take_removals()
                promotion = next(iter(self.promotions), None)
                suspects = self._take_suspects()
                must_commit = self._must_commit(is_idle=header is None)
                if header is None and promotion is None and not (removals or suspects or must_commit or needs_probe):
                    if self._is_closing:
                        return
                    self._changed.notify_all()  # a flush may wait for writes that have been given up
                    self._changed.wait(self._idle_s())
                    continue
                self._busy_since = self._clock()
            if needs_probe:
                self._probe()
            # First of all: a full disk gets room by them, and an id must go before it may come again.
            for removal in removals:
                self._remove_file(removal)
            for extent_id in suspects:
                self._reconsider(extent_id)
            if header is not None:
                self._write(header)
            if must_commit or (header is not None and not self._config.commit_interval_s):
                self._commit()
            if promotion is not None:
                self._promote(promotion)

    def _must_commit(self, *, is_idle: bool) -> bool:
        if not self._uncommitted_bytes:
            return False
        is_due = self._clock() >= self._commit_at or self._uncommitted_bytes >= self._config.max_batch_bytes
        return is_due or (is_idle and (self._is_closing or self._num_hurrying > 0))

    def _idle_s(self) -> float:
        return max(0.0, min(1.0, self._commit_at - self._clock())) if self._uncommitted_bytes else 1.0

    def _take_removals(self) -> list["_Removal"]:
        """Files to remove now; none while the disk is down, or the thread would spin on them."""
        if self.degraded and self._clock() < self._retry_at:
            return []
        removals = list(self._removals)
        self._removals.clear()
        return removals

    def _take_suspects(self) -> list[str]:
        """Files to look at now; while the disk is down they wait, as they would all look bad."""
        if self.degraded:
            return []
        suspects = list(self._suspects)
        self._suspects.clear()
        return suspects

    def _reconsider(self, extent_id: str) -> None:
        assert self._disk is not None
        try:
            verify_image(extent_id, self._disk.read(extent_id))
        except (FileNotFoundError, ExtentCorrupt) as bad:
            self.quarantine(extent_id, Tier.DISK, str(bad))
        except OSError as error:
            try:
                self._disk.probe()
            except OSError as failure:
                self._failed(failure)
                self.suspect(extent_id)  # to be looked at when the disk works again
            else:
                self.quarantine(extent_id, Tier.DISK, str(error))

    def _remove_file(self, removal: "_Removal") -> None:
        assert self._disk is not None
        with self._changed:
            extent = self._ledger.held.find(removal.extent_id)
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
            self._failed(error)

    # -- writing ------------------------------------------------------------------------------------

    def _write(self, header: ExtentHeader) -> None:
        assert self._disk is not None
        extent_id = header.extent_id
        try:
            self._check_space(header.image_bytes)
            self._disk.write(header, self._dram.get(extent_id))
        except KeyError:
            self._give_up(extent_id)  # found bad and dropped meanwhile
        except (ExtentCorrupt, StoreUnavailable) as lost:
            self.quarantine(extent_id, Tier.DRAM, str(lost))
            self._give_up(extent_id)
        except _LowSpace as low:
            self._probe_bytes = header.image_bytes
            with self._changed:
                self._ledger.disk.write_failed([extent_id], retry=True)
            self._commit()  # what was written before: later, its success would look like the end of the trouble
            with self._changed:
                self._degrade(str(low))
        except OSError as error:
            self._write_failed(error)
        else:
            if not self._uncommitted_bytes:
                self._commit_at = self._clock() + self._config.commit_interval_s
            self._uncommitted_bytes += header.image_bytes

    def _commit(self) -> None:
        if not self._uncommitted_bytes:
            return
        assert self._disk is not None
        try:
            committed = self._disk.commit()
        except OSError as error:
            self._write_failed(error)
            return
        self._uncommitted_bytes = 0
        with self._changed:
            for extent_id in committed:
                self.apply(self._ledger.disk.written(extent_id))
            self._works_again()

    def _write_failed(self, error: OSError) -> None:
        """Nothing that is not committed can be relied on: all of it is to be written again."""
        assert self._disk is not None
        self._uncommitted_bytes = 0
        self._disk.abandon()
        with self._changed:
            self._ledger.disk.write_failed(list(self._ledger.room.writing), retry=True)
            self._changed.notify_all()
        self._failed(error)
        self._check_folder()

    def _give_up(self, extent_id: str) -> None:
        with self._changed:
            self._ledger.disk.write_failed([extent_id], retry=False)
            self._changed.notify_all()

    # -- promoting ----------------------------------------------------------------------------------

    def _promote(self, extent_id: str) -> None:
        assert self._disk is not None
        with self._changed:
            del self.promotions[extent_id]
            drops = self._ledger.disk.prepare_promote(extent_id)
            if drops is None:
                return
            self.apply(drops)
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
            if not self._ledger.disk.complete_promote(extent_id, succeeded=succeeded) and succeeded:
                self._dram.drop(extent_id)
            self._changed.notify_all()
        if bad is not None:
            self.quarantine(extent_id, Tier.DISK, bad)

    # -- trouble ------------------------------------------------------------------------------------

    def _failed(self, error: OSError) -> None:
        with self._changed:
            self._degrade(str(error))

    def _degrade(self, reason: str) -> None:
        """Go on without the disk until a probe succeeds; under the lock."""
        self._retry_at = self._clock() + self._config.retry_s
        if self.degraded is None:
            logger.warning("the warehouse's disk tier is degraded: %s; serving goes on without it", reason)
        self.degraded = reason
        self._ledger.room.disk_accepts_writes = False

    def _probe(self) -> None:
        """Ask the disk whether it works again."""
        assert self._disk is not None
        self._check_folder()
        try:
            self._disk.probe()
            self._check_space(self._probe_bytes)
        except (OSError, _LowSpace) as error:
            with self._changed:
                self._degrade(str(error))
        else:
            with self._changed:
                self._works_again()

    def _works_again(self) -> None:
        """Under the lock."""
        if self.degraded:
            logger.warning("the warehouse's disk works again")
        self.degraded = None
        self._probe_bytes = 0
        self._ledger.room.disk_accepts_writes = True
        self._changed.notify_all()

    def _check_space(self, num_bytes: int) -> None:
        assert self._disk is not None
        if self._disk.free_bytes() < self._config.min_free_bytes + num_bytes:
            raise _LowSpace(f"less than {self._config.min_free_bytes >> 20} MiB free on the file system")

    def _check_folder(self) -> None:
        """A folder that was taken away or replaced is owned anew, with what is in it now."""
        assert self._disk is not None
        if self._disk.is_intact():
            return
        try:
            self._disk.reopen()
        except FolderError as error:
            logger.warning("the warehouse's folder is gone: %s", error)
            return
        with self._changed:
            self._removals.clear()
            self.apply(self._ledger.disk.replace_disk(self._disk.recover(), self._disk.recover_locked()))
            self._changed.notify_all()
        logger.warning("the warehouse's folder was taken away: a new one is in its place")


@dataclass(frozen=True, slots=True)
class _Removal:
    """A file to delete, or to set aside because it is bad."""

    extent_id: str
    is_bad: bool = False


class _LowSpace(Exception):
    """The file system has less free space than the configuration wants kept."""
