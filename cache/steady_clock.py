"""A clock that never goes back, over one that may jump."""

import threading
from collections.abc import Callable


class SteadyClock:
    """Counts the seconds by which `source` moves forward; where it jumps back, no time has passed.

    So whatever waits for a moment waits at most as much longer as the jump itself took.
    """

    def __init__(self, source: Callable[[], float]) -> None:
        self._source = source
        self._guard = threading.Lock()
        self._seen = self._now = source()

    def __repr__(self) -> str:
        return f"<SteadyClock {self._now:.3f}>"

    def __call__(self) -> float:
        with self._guard:
            seen = self._source()
            self._now += max(0.0, seen - self._seen)
            self._seen = seen
            return self._now
