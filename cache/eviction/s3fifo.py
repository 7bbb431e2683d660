"""S3-FIFO (Yang et al., SOSP 2023): a scan passes through a small queue and never reaches the main one.

    new -> [ small, a tenth ] -- used meanwhile --> [ main ] -- used meanwhile --> round again
                   |                                    |
                   +-- not used: gone, but remembered   +-- not used: gone
                                    |
    remembered when it comes back: straight into main

Promotions happen while extents are added, a few at a time, so that `victims` only reads.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from cache.eviction.departed import Departed, digest_of

SMALL_SHARE = 0.1
_MOST_USES = 3
_STEPS_PER_ADD = 8


class S3FifoPolicy:
    """See the module's docstring. Shares are counted in extents."""

    def __init__(self) -> None:
        self._small: OrderedDict[str, int] = OrderedDict()
        self._main: OrderedDict[str, int] = OrderedDict()
        """Uses since the extent entered the queue or last went round, at most three."""
        self._departed = Departed()

    def __repr__(self) -> str:
        return f"<S3FifoPolicy {len(self._small)} small, {len(self._main)} main>"

    def add(self, extent_id: str, bytes_per_token: int = 1) -> None:
        if extent_id in self._small or extent_id in self._main:
            self.touch(extent_id)
            return
        is_back = self._departed.recall(digest_of(extent_id)) is not None
        (self._main if is_back else self._small)[extent_id] = 0
        self._departed.grow_for(len(self._small) + len(self._main))
        self._advance()

    def restore(self, extents: Iterable[tuple[str, int]]) -> None:
        # Whether they were used more than once is not known: a scan shall not have them all in its way.
        self._main.update((extent_id, 0) for extent_id, _ in extents)
        self._departed.grow_for(len(self._main))

    def touch(self, extent_id: str) -> None:
        for queue in (self._small, self._main):
            if extent_id in queue:
                queue[extent_id] = min(queue[extent_id] + 1, _MOST_USES)

    def refresh(self, extent_id: str) -> None:
        for queue in (self._small, self._main):
            if extent_id in queue:
                queue.move_to_end(extent_id)

    def remove(self, extent_id: str) -> None:
        if self._small.pop(extent_id, None) is not None:
            self._departed.remember(digest_of(extent_id), 0)
        self._main.pop(extent_id, None)

    def victims(self) -> Iterator[str]:
        cold = (extent_id for extent_id, uses in self._small.items() if not uses)
        yield from itertools.islice(cold, self._num_over_share())
        yield from (extent_id for extent_id, uses in self._main.items() if not uses)
        yield from cold
        for queue in (self._main, self._small):
            yield from (extent_id for extent_id, uses in queue.items() if uses)

    def _num_over_share(self) -> int:
        """Extents by which the small queue is longer than its share."""
        return max(0, len(self._small) - int(SMALL_SHARE * (len(self._small) + len(self._main))))

    def _advance(self) -> None:
        """Let what was used leave the front of the queues, so that a victim is found there at once."""
        for _ in range(_STEPS_PER_ADD):
            extent_id = next(iter(self._small), None)
            if extent_id is not None and self._num_over_share() and self._small[extent_id]:
                del self._small[extent_id]
                self._main[extent_id] = 0
                continue
            extent_id = next(iter(self._main), None)
            if extent_id is None or not self._main[extent_id]:
                return
            self._main[extent_id] -= 1
            self._main.move_to_end(extent_id)
