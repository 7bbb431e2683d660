"""Reads everything on disk again in the background, slowly, to find what has gone bad before a reader does.

A round goes over all extents that are on disk when it begins. A bad one is quarantined as if a reader had found it;
files are immutable, so nothing needs to stop for it. Never changes a file, and never holds the lock while it reads.
"""

import logging
import threading
from collections.abc import Callable

from cache.disk_worker import DiskWorker
from cache.errors import ExtentCorrupt
from cache.events import Tier
from cache.extent import verify_image
from cache.extent_tree import Extent
from cache.ledger import Ledger
from cache.tiers.interface import DiskTier

logger = logging.getLogger("tokenloft.warehouse")

ROUND_INTERVAL_S = 86_400.0
"""From the begin of one round to that of the next."""


class Scrubber:
    """See the module's docstring. `close` ends it within one read."""

    def __init__(
        self,
        bytes_per_s: float,
        ledger: Ledger,
        changed: threading.Condition,
        disk: DiskTier,
        worker: DiskWorker,
        clock: Callable[[], float],
        round_interval_s: float = ROUND_INTERVAL_S,
    ) -> None:
        """`changed` is the lock of all decisions."""
        self.num_left = 0
        """Extents still to be read in this round."""
        self._bytes_per_s = bytes_per_s
        self._ledger = ledger
        self._changed = changed
        self._disk = disk
        self._worker = worker
        self._clock = clock
        self._round_interval_s = round_interval_s
        self._has_failed = False
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tokenloft-scrub", daemon=True)

    def __repr__(self) -> str:
        return f"<Scrubber {self._bytes_per_s:g} bytes/s, {self.num_left} extents left>"

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """A read that hangs is left behind."""
        self._is_closing.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            started = self._clock()
            self._run_round()
            self._is_closing.wait(max(1.0, started + self._round_interval_s - self._clock()))

    def _run_round(self) -> None:
        with self._changed:
            extents = [extent for extent in self._ledger.held if extent.on_disk]
        self.num_left = len(extents)
        for extent in extents:
            started = self._clock()
            if not self._scrub(extent):
                return
            self.num_left -= 1
            if self._is_closing.wait(pause_s(extent.image_bytes, self._bytes_per_s, self._clock() - started)):
                return
        with self._changed:
            self._ledger.counters["scrub_rounds"] += 1

    def _scrub(self, extent: Extent) -> bool:
        """Read one extent. False if the disk itself seems to fail, which ends the round."""
        try:
            verify_image(extent.extent_id, self._disk.read(extent.extent_id))
        except (ExtentCorrupt, OSError) as error:
            return self._judge(extent, error)
        self._has_failed = False
        with self._changed:
            self._ledger.counters["scrubbed_extents"] += 1
            self._ledger.counters["scrubbed_bytes"] += extent.image_bytes
        return True

    def _judge(self, extent: Extent, error: ExtentCorrupt | OSError) -> bool:
        """What a failed read says of the file, or of the disk: then False."""
        with self._changed:
            if not extent.on_disk:
                return True  # evicted or purged while it was read
        # One file that can't be read is bad; where a second one follows, it is the disk.
        has_failed, self._has_failed = self._has_failed, isinstance(error, OSError)
        if self._has_failed and (has_failed or not self._disk.is_intact()):
            self._has_failed = False
            self._worker.suspend(str(error))
            return False
        self._worker.quarantine(extent.extent_id, Tier.DISK, str(error))
        return True


def pause_s(num_bytes: int, bytes_per_s: float, spent_s: float) -> float:
    """How long to rest after reading `num_bytes` in `spent_s`, to stay at `bytes_per_s`."""
    return max(0.0, num_bytes / bytes_per_s - spent_s)
