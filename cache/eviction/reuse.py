"""Least value first: recompute time saved per byte times the chance that the extent is used again soon.

Extents are grouped by how often they were used, also before they last left the tier. Each group keeps its extents
in the order of their last use, and `ReuseStatistics` learns its hazard: the chance per unit of time of the next
use, which falls with the time since the last one. So the least valuable extent of a group is its oldest one, and
the victim is the oldest of one of the groups. With one group this is LRU; with several, what was used once waits
only as long as such extents have been worth it, and a scan leaves early.

Ancestors were used at least as often as their descendants and are touched after them, so the order is leaf-first
nearly by itself. Nothing is set by hand for a size or a kind of traffic.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np

from cache.eviction.departed import Departed, digest_of
from cache.eviction.reuse_statistics import BOUNDS, NUM_AGES, ReuseStatistics

NUM_GROUPS = 5
"""Never used again, used again once, twice, three times, more often."""
_LEARN_EVERY = 512
_STAMP_EVERY = 16
_STEPS_PER_OCTAVE = 4


class _Queue:
    """Extents of one group and one density, the least recently used first, with the times of their last use."""

    __slots__ = ("bytes_per_token", "group", "last_used")

    def __init__(self, group: int, bytes_per_token: int) -> None:
        self.group = group
        self.bytes_per_token = bytes_per_token
        self.last_used: OrderedDict[str, int] = OrderedDict()


class ReusePolicy:
    """See the module's docstring. Time is the number of uses so far."""

    def __init__(self) -> None:
        self._statistics = ReuseStatistics(NUM_GROUPS)
        self._departed = Departed()
        self._queues: dict[tuple[int, int], _Queue] = {}
        """By group and bytes per token, of which a store has a few: one for each storage dtype and model."""
        self._num_extents = 0
        self._now = 0
        self._stamp = 0
        """The time in steps: extents used within a step share one number object."""
        self._values: list[list[float]] = []
        self._learn()

    def __repr__(self) -> str:
        sizes = [0] * NUM_GROUPS
        for queue in self._queues.values():
            sizes[queue.group] += len(queue.last_used)
        return f"<ReusePolicy {self._num_extents} extents, by uses {sizes}>"

    def add(self, extent_id: str, bytes_per_token: int = 1) -> None:
        if any(extent_id in queue.last_used for queue in self._queues.values()):
            self.touch(extent_id)
            return
        digest = digest_of(extent_id)
        num_hits = self._departed.recall(digest)
        self._num_extents += 1
        self._departed.grow_for(self._num_extents)
        self._enter(extent_id, digest, 0 if num_hits is None else num_hits + 1, bytes_per_token)

    def restore(self, extents: Iterable[tuple[str, int]]) -> None:
        for extent_id, bytes_per_token in extents:
            self._queue(0, bytes_per_token).last_used[extent_id] = self._stamp
        self._num_extents = sum(len(queue.last_used) for queue in self._queues.values())
        self._departed.grow_for(self._num_extents)

    def touch(self, extent_id: str) -> None:
        # A note of each extent's queue would take more room than it saves time.
        for queue in self._queues.values():
            if queue.last_used.pop(extent_id, None) is not None:
                self._enter(extent_id, digest_of(extent_id), queue.group + 1, queue.bytes_per_token)
                return

    def refresh(self, extent_id: str) -> None:
        for queue in self._queues.values():
            if extent_id in queue.last_used:
                queue.last_used[extent_id] = self._stamp
                queue.last_used.move_to_end(extent_id)
                return

    def remove(self, extent_id: str) -> None:
        for queue in self._queues.values():
            if queue.last_used.pop(extent_id, None) is not None:
                self._num_extents -= 1
                self._departed.remember(digest_of(extent_id), queue.group)
                return

    def victims(self) -> Iterator[str]:
        # Within a queue values never fall from one extent to the next: merge the queues. Among equals, the oldest.
        heads: list[tuple[float, int, int, str, Iterator[tuple[str, int]], _Queue]] = []
        for number, queue in enumerate(self._queues.values()):
            rest = iter(queue.last_used.items())
            for extent_id, stamp in rest:
                heads.append((self._value(queue, stamp), stamp, number, extent_id, rest, queue))
                break
        heapq.heapify(heads)
        while heads:
            _, _, number, extent_id, rest, queue = heads[0]
            yield extent_id
            following = next(rest, None)
            if following is None:
                heapq.heappop(heads)
            else:
                extent_id, stamp = following
                heapq.heapreplace(heads, (self._value(queue, stamp), stamp, number, extent_id, rest, queue))

    def _queue(self, group: int, bytes_per_token: int) -> _Queue:
        queue = self._queues.get((group, bytes_per_token))
        if queue is None:
            queue = self._queues[group, bytes_per_token] = _Queue(group, bytes_per_token)
        return queue

    def _enter(self, extent_id: str, digest: int, num_hits: int, bytes_per_token: int) -> None:
        self._now += 1
        if self._now % _STAMP_EVERY == 0:
            self._stamp = self._now
        if self._now % _LEARN_EVERY == 0:
            self._learn()
        group = min(num_hits, NUM_GROUPS - 1)
        self._queue(group, bytes_per_token).last_used[extent_id] = self._stamp
        self._statistics.use(digest, group, self._now, self._num_extents)

    def _learn(self) -> None:
        self._statistics.fade(self._now)
        self._values = [_interpolated(hazards) for hazards in self._statistics.hazards()]

    def _value(self, queue: _Queue, stamp: int) -> float:
        step = round(_STEPS_PER_OCTAVE * math.log2(max(1, self._now - stamp)))
        return self._values[queue.group][step] / queue.bytes_per_token


def _interpolated(hazards: list[float]) -> list[float]:
    """Hazards by the logarithm of the age, between the middles of the ages, so that no step divides near equals."""
    logs = [math.log(hazard) for hazard in hazards]
    middles = [math.log2((BOUNDS[age] + BOUNDS[age + 1]) / 2) for age in range(NUM_AGES)]
    steps = range(_STEPS_PER_OCTAVE * 64)
    found: list[float] = np.exp(np.interp([step / _STEPS_PER_OCTAVE for step in steps], middles, logs)).tolist()
    return found
