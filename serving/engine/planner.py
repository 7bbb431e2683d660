"""Plans loads from measured speeds, and says how much of a loading sequence the step loop may compute meanwhile.

A plan is made when the store has answered, on the loader's thread, and is never trusted for long: a load that
takes twice its estimate is helped by computing, and each chunk that is computed beside a load is cut so that it
ends when the load, by what it has done so far, would have got there. So the two meet where they meet, and a wrong
estimate costs a part of one step.
"""

import time
from bisect import bisect_right
from collections.abc import Callable
from typing import Literal

from cache.messages import LoadGrant
from router.cost import CostModel
from serving.engine.load_plan import plan_load, stretches
from serving.engine.loader import Loader
from serving.engine.measure import Speed
from serving.engine.meeting import Meeting
from serving.protocol import LoadPlan

LoadMode = Literal["auto", "load", "compute"]

LATE = 2.0
"""A load alone is late after so many times its estimate."""
LATE_S = 0.05
"""But not before so long: threads and disks have their hiccups."""
GRACE_S = 0.02
"""A load shows for so long how fast it is, before a step that can't be taken back is made beside it."""
PATIENCE_S = 1.0
"""A store that has not answered for so long is not waited for any longer."""
WORTH_STEPS = 1.5
"""A chunk must spare the load at least so many times what any step costs, however few its tokens are."""
TRUST_TOKENS = 256
"""The estimate of a load's speed counts as much as so many tokens that have come."""


class Planner:
    """See the module's docstring. Without a `loader` it knows no bandwidths."""

    def __init__(
        self,
        mode: LoadMode,
        bytes_per_token: int,
        block_size: int,
        speed: Speed,
        loader: Loader | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`bytes_per_token` are those of KV as it is stored."""
        self._mode = mode
        self._costs = CostModel(bytes_per_token)
        self._block_size = block_size
        self._speed = speed
        self._loader = loader
        self._clock = clock

    def now(self) -> float:
        return self._clock()

    def costs(self) -> CostModel:
        """As measured until now."""
        bandwidths = self._loader.bandwidths() if self._loader is not None else ()
        return self._costs.with_speeds(self._speed.first_tokens_per_s, self._speed.prefill_s_per_position, bandwidths)

    def plan(self, grant: LoadGrant, first_token: int) -> LoadPlan:
        """What to do about the granted tokens behind the first `first_token`. May be called by any thread."""
        stored = stretches(grant.pieces, first_token, self._block_size)
        costs = self.costs()
        if self._mode == "load":
            num_tokens = sum(count for _, count in stored)
            return LoadPlan("load", num_tokens, 0, sum(costs.seconds_to_load(*stretch) for stretch in stored))
        return plan_load(stored, first_token, self._block_size, costs)

    @property
    def never_loads(self) -> bool:
        """The store is not even asked."""
        return self._mode == "compute"

    def may_compute(self, meeting: Meeting) -> bool:
        """Whether the step loop may compute from the front. Turns a load that is late."""
        return meeting.is_turned or (self._is_late(meeting) and meeting.turn())

    def _is_late(self, meeting: Meeting) -> bool:
        if self._mode != "auto":
            return False
        if meeting.plan is None:
            return self._clock() > meeting.began_at + PATIENCE_S
        return self._clock() > meeting.planned_at + max(LATE_S, LATE * meeting.plan.estimated_s)

    def chunk(self, meeting: Meeting, front: int, budget: int) -> int:
        """How many of the tokens from `front` on, `budget` at most, are better computed now than waited for."""
        gap = meeting.back - front
        most = min(budget, gap)
        if meeting.is_over or meeting.plan is None or most <= 0:
            return most
        if self._clock() < meeting.planned_at + GRACE_S:
            return 0
        load_tokens_per_s = self._load_tokens_per_s(meeting, meeting.plan)
        cost = self._speed.step_cost

        def is_too_many(num_tokens: int) -> bool:
            # The load would have brought the last of them together with the block that it is in.
            return cost.seconds(num_tokens, front) * load_tokens_per_s > gap - num_tokens + self._block_size

        num_tokens = bisect_right(range(1, most + 1), False, key=is_too_many)
        if num_tokens < WORTH_STEPS * cost.step_s * load_tokens_per_s:
            return 0
        if num_tokens == gap:
            return num_tokens
        # The load brings whole blocks: the rest of one that is begun would have to be computed in any case.
        return max(0, num_tokens - (front + num_tokens) % self._block_size)

    def _load_tokens_per_s(self, meeting: Meeting, plan: LoadPlan) -> float:
        """What the load has done so far, and what was expected of it before it has done much."""
        expected_s = TRUST_TOKENS * plan.estimated_s / max(1, plan.load_tokens)
        elapsed_s = self._clock() - meeting.planned_at
        return (TRUST_TOKENS + meeting.num_loaded) / max(1e-9, expected_s + elapsed_s)
