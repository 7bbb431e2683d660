"""An engine's own view of its speed and load, and the report of both to the node store."""

import math
import time
from collections.abc import Callable
from typing import Literal

from cache.events import DeviceBlocks, ReplicaLoad
from cache.hashing import BlockHash, pack_hashes
from serving.engine.loader import Loader
from serving.engine.scheduler import ScheduledPart, Scheduler
from serving.engine.step_cost import StepCost, StepCostFit, num_attended

REPORT_INTERVAL_S = 0.25
IDLE_REPORT_INTERVAL_S = 5.0
"""Often enough that the node store does not take a quiet engine for a dead one."""

_WEIGHT = 0.2
"""Of the newest step in the running averages."""
_MIN_PREFILL_TOKENS = 32
"""A shorter chunk's speed says more about the step's fixed cost than about prefill."""


_MIN_FITTED_TOKENS = 8


class Speed:
    """Running averages over steps, and what a step of prefill costs at which place of a prompt."""

    def __init__(self, step_tokens: int = 256) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self._step_tokens = step_tokens
        self._fit = StepCostFit()

    def reset(self) -> None:
        """Forget what was measured: it was not what is to come."""
        self.prefill_tokens_per_s = self.decode_step_s = 0.0
        self._fit = StepCostFit()

    @property
    def step_cost(self) -> StepCost:
        """As measured, or as assumed before the first prefill. May be read by any thread."""
        return self._fit.cost

    @property
    def first_tokens_per_s(self) -> float:
        """Speed of prefill where there is little to attend to yet; 0 before the first prefill."""
        return self._fit.cost.tokens_per_s(self._step_tokens) if self._fit.is_measured else 0.0

    @property
    def prefill_s_per_position(self) -> float:
        """See `ReplicaLoad`."""
        return self._fit.cost.position_s if self._fit.is_measured else 0.0

    def note(self, parts: list[ScheduledPart], seconds: float) -> None:
        """Take in one step, whose sequences have not moved on yet."""
        num_tokens = sum(part.num_tokens for part in parts)
        if num_tokens == len(parts):
            self.decode_step_s = _mix(self.decode_step_s, seconds)
            return
        if num_tokens >= _MIN_PREFILL_TOKENS:
            self.prefill_tokens_per_s = _mix(self.prefill_tokens_per_s, num_tokens / seconds)
        if num_tokens >= _MIN_FITTED_TOKENS:
            attended = sum(num_attended(part.num_tokens, part.sequence.num_computed) for part in parts)
            self._fit.note(num_tokens, attended, seconds)


def _mix(average: float, value: float) -> float:
    return value if average == 0.0 else average + _WEIGHT * (value - average)


class Reporter:
    """Tells the node store what the engine has to do and what its pool holds. Part of the step loop."""

    def __init__(
        self,
        replica_id: str,
        role: Literal["prefill", "decode"],
        scheduler: Scheduler,
        speed: Speed,
        loader: Loader,
        post: Callable[[Callable[[], None]], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replica_id = replica_id
        self._role: Literal["prefill", "decode"] = role
        self._scheduler = scheduler
        self._speed = speed
        self._loader = loader
        self._post = post
        self._clock = clock
        self._needs_all = True
        self._removed: set[BlockHash] = set()
        """What has left the pool since the last report that arrived."""
        self._is_in_flight = False
        self._sent_at = -math.inf

    def report(self, *, is_idle: bool) -> None:
        """Send a report if one is due.

        All holdings go with it after one that was lost or came to a store that did not know this engine, as a
        new store does; so the very first goes twice.
        """
        elapsed = self._clock() - self._sent_at
        if self._is_in_flight or elapsed < REPORT_INTERVAL_S:
            return
        pool = self._scheduler.pool
        if is_idle and not self._needs_all and not pool.has_changes and elapsed < IDLE_REPORT_INTERVAL_S:
            return
        self._sent_at = self._clock()
        self._is_in_flight = True
        changes = pool.take_changes()
        added = pool.all_hashes() if self._needs_all else changes.added
        self._removed = (self._removed | changes.removed) - added
        blocks = DeviceBlocks(self._replica_id, pack_hashes(list(added)), pack_hashes(list(self._removed)))
        self._needs_all = False
        self._loader.report(self._load(), blocks, lambda was_known: self._post(lambda: self._on_sent(was_known)))

    def _on_sent(self, was_known: bool) -> None:
        self._is_in_flight = False
        if was_known:
            self._removed.clear()
        else:
            self._needs_all = True

    def _load(self) -> ReplicaLoad:
        scheduler = self._scheduler
        return ReplicaLoad(
            self._replica_id,
            self._role,
            num_running=len(scheduler.admitted),
            num_waiting=len(scheduler.waiting),
            queued_prefill_tokens=scheduler.num_queued_prefill_tokens,
            prefill_tokens_per_s=self._speed.first_tokens_per_s,
            decode_step_s=self._speed.decode_step_s,
            load_bytes_per_s=self._loader.bandwidths(),
            prefill_s_per_position=self._speed.prefill_s_per_position,
        )
