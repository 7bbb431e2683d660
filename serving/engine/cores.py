"""Which cores an engine uses: its share of the machine's, and those of its neighbours while they rest.

Engines of one machine tell each other whether they work by a file each, locked while its engine has steps to do.
The lock of a process that dies is gone with it, so a dead engine rests. Asking costs microseconds and happens
before each step.

An engine gives cores back from one step to the next, and takes them only when their owner has rested for a while:
two engines whose threads spin on the same cores are slower than either alone.
"""

import fcntl
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from serving.engine.runner import set_num_threads

logger = logging.getLogger("tokenloft.engine")

PATIENCE_S = 0.1
"""A neighbour that has rested for less is about to go on, or to hear of what has just been handed off."""
BACKGROUND_NICENESS = 5
"""Added to that of the process."""
LOOK_INTERVAL_S = 1.0
"""How often an engine looks for new neighbours."""


def num_threads_for(num_own: int, num_cores: int, rested_s: Iterable[float]) -> int:
    """Threads for the next step of an engine with `num_own` cores of its own.

    `rested_s`: for how long each neighbour has rested, 0 for one that works. Those that work share the machine.
    """
    num_working = 1 + sum(seconds < PATIENCE_S for seconds in rested_s)
    return max(num_own, num_cores // num_working)


class Neighbours:
    """The engines that share a machine, as one of them sees it. Belongs to the step loop; `close` once at the end."""

    def __init__(self, directory: Path, name: str, clock: Callable[[], float] = time.time) -> None:
        """`directory` is the same for all of them. Raises OSError if it can't be used."""
        self._directory = directory
        self._path = directory / name
        self._clock = clock
        self._others: dict[str, int] = {}
        self._look_at = 0.0
        self._is_working = False
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.utime(self._fd, (0.0, 0.0))  # it has not worked yet

    def __repr__(self) -> str:
        return f"<Neighbours of {self._path.name}: {len(self._others)}>"

    def close(self) -> None:
        for fd in (self._fd, *self._others.values()):
            os.close(fd)
        self._others.clear()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # others are there still
            self._directory.rmdir()

    def work(self) -> None:
        """This engine has steps to do."""
        if not self._is_working:
            with suppress(OSError):  # somebody is asking right now: then at the next step
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._is_working = True

    def rest(self) -> None:
        """This engine has nothing to do."""
        if self._is_working:
            os.utime(self._fd, (self._clock(),) * 2)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._is_working = False

    def rested_s(self) -> list[float]:
        """For how long each of the others has rested; 0 for one that works."""
        now = self._clock()
        if abs(now - self._look_at) >= LOOK_INTERVAL_S:
            self._look_at = now
            self._look()
        return [self._rested_s(fd, now) for fd in self._others.values()]

    def _rested_s(self, fd: int, now: float) -> float:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return 0.0
        fcntl.flock(fd, fcntl.LOCK_UN)
        return max(0.0, now - os.fstat(fd).st_mtime)

    def _look(self) -> None:
        names = set(os.listdir(self._directory)) - {self._path.name}  # noqa: PTH208 - names are what is wanted
        for name in self._others.keys() - names:
            os.close(self._others.pop(name))
        for name in names - self._others.keys():
            with suppress(OSError):  # it has just left
                self._others[name] = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


class Cores:
    """An engine's threads, step by step. Belongs to the step loop."""

    def __init__(
        self,
        num_own: int,
        num_cores: int = 0,
        neighbours: Neighbours | None = None,
        apply: Callable[[int], object] = set_num_threads,
    ) -> None:
        """`num_own` threads always, or up to `num_cores` while the `neighbours` rest."""
        self._num_own = num_own
        self._num_cores = num_cores
        self._neighbours = neighbours
        self._apply = apply
        self.num_threads = 0

    def __repr__(self) -> str:
        return f"<Cores {self.num_threads} threads, {self._num_own} of its own>"

    def begin_step(self) -> None:
        """Set the calling thread's number of threads, and tell the neighbours that this engine works."""
        num_threads = self._num_own
        if self._neighbours is not None:
            self._neighbours.work()
            num_threads = num_threads_for(self._num_own, self._num_cores, self._neighbours.rested_s())
        if num_threads != self.num_threads:
            self.num_threads = num_threads
            self._apply(num_threads)

    def rest(self) -> None:
        """There is nothing to do."""
        if self._neighbours is not None:
            self._neighbours.rest()

    def close(self) -> None:
        if self._neighbours is not None:
            self._neighbours.close()


def begin_background_thread() -> None:
    """Have the calling thread compute on one core, and give way where a step loop wants it.

    A core that both want then goes to the step loop for three quarters of the time: a decode step takes little longer
    while a chunk of somebody's prompt is stored or loaded. Where cores are idle nothing changes.
    """
    set_num_threads(1)
    if sys.platform.startswith("linux"):  # elsewhere this would be the whole process
        with suppress(OSError):
            niceness = os.getpriority(os.PRIO_PROCESS, 0) + BACKGROUND_NICENESS
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def shared_cores(num_own: int, node_id: str, name: str) -> Cores:
    """Cores that are shared with the other engines of the node. Without a place to meet them, the own ones alone."""
    directory = Path(tempfile.gettempdir(), f"tokenloft-{os.getuid()}", node_id)
    try:
        neighbours = Neighbours(directory, name)
    except OSError as error:
        logger.warning("idle cores stay idle: %s", error)
        return Cores(num_own)
    return Cores(num_own, len(os.sched_getaffinity(0)), neighbours)
