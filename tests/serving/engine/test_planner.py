"""A plan is not trusted for long: late loads are helped, and a chunk ends when the load would have got there."""

from typing import Literal

import pytest

from cache.events import Tier
from cache.hashing import as_token_ids
from cache.messages import LoadGrant, LoadPiece
from serving.engine.measure import Speed
from serving.engine.meeting import Meeting
from serving.engine.planner import GRACE_S, LATE, LATE_S, PATIENCE_S, LoadMode, Planner
from serving.engine.scheduler import ScheduledPart
from serving.engine.sequence import EngineRequest, Listener, Sequence
from serving.engine.step_cost import StepCost
from serving.protocol import LoadPlan, SamplingParams
from tests.cache.chains import ROOT

BLOCK_SIZE = 32
KV_BYTES = 46_080


class Bench:
    """A planner whose clock is the test's, and one meeting."""

    def __init__(self, mode: LoadMode = "auto") -> None:
        self.now_s = 100.0
        self.speed = Speed()
        self.planner = Planner(mode, KV_BYTES, BLOCK_SIZE, self.speed, None, lambda: self.now_s)

    def meeting(
        self, stored: int, kind: Literal["load", "both"] = "both", estimated_s: float = 1.0, front: int = 0
    ) -> Meeting:
        meeting = Meeting(front, stored + 10, BLOCK_SIZE, self.now_s)
        meeting.begin_load(LoadPlan(kind, stored - front, 0, estimated_s), stored, self.now_s)
        return meeting


def grant_of(num_tokens: int, tier: Tier = Tier.DISK) -> LoadGrant:
    return LoadGrant((LoadPiece("x", tier, 0, num_tokens, 0, None),), num_tokens)


def test_a_load_alone_is_helped_when_it_is_late() -> None:
    bench = Bench()
    meeting = bench.meeting(4096, "load", estimated_s=0.3)
    bench.now_s += 0.3 * LATE * 0.95
    assert not bench.planner.may_compute(meeting)
    bench.now_s += 0.3 * LATE * 0.1
    assert bench.planner.may_compute(meeting)
    assert meeting.is_turned


def test_a_hiccup_is_not_late() -> None:
    bench = Bench()
    meeting = bench.meeting(64, "load", estimated_s=0.001)
    bench.now_s += LATE_S * 0.9
    assert not bench.planner.may_compute(meeting)


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    bench = Bench()
    meeting = Meeting(0, 500, BLOCK_SIZE, bench.now_s)
    assert not bench.planner.may_compute(meeting)
    bench.now_s += PATIENCE_S * 1.01
    assert bench.planner.may_compute(meeting)
    assert bench.planner.chunk(meeting, 0, 256) == 256


@pytest.mark.parametrize("mode", ["load", "auto"])
def test_a_load_that_is_asked_for_is_left_alone(mode: LoadMode) -> None:
    bench = Bench(mode)
    plan = bench.planner.plan(grant_of(64), 0)
    assert plan.kind == "load"
    meeting = bench.meeting(64, "load", plan.estimated_s)
    bench.now_s += 1000
    assert bench.planner.may_compute(meeting) is (mode == "auto")


@pytest.mark.parametrize("load_tokens_per_s", [434.0, 2170.0])
@pytest.mark.parametrize("stored", [512, 2048, 7680])
def test_a_front_never_computes_what_the_load_brings_sooner(stored: int, load_tokens_per_s: float) -> None:
    bench, cost = Bench(), StepCost()
    meeting = bench.meeting(stored, estimated_s=stored / load_tokens_per_s)
    started, front, back = bench.now_s, 0, stored
    while front < back:
        count = meeting.claim_front(bench.planner.chunk(meeting, front, 256))
        front += count
        bench.now_s += cost.seconds(count, front - count) if count else 0.02
        while back > front and (stored - back) / load_tokens_per_s < bench.now_s - started:
            back -= BLOCK_SIZE
            if meeting.claim_previous(back):
                meeting.wrote(back, back + BLOCK_SIZE, Tier.DISK)
        meeting.meet(front)
    load_s = stored / load_tokens_per_s
    compute_s = sum(cost.seconds(256, first) for first in range(0, stored, 256))
    both_s = bench.now_s - started
    assert both_s <= 1.05 * min(load_s, compute_s) + 0.02
    if stored > 1000:
        assert both_s < 0.9 * min(load_s, compute_s)


def test_a_load_that_stops_leaves_the_rest_to_the_front() -> None:
    bench = Bench()
    meeting = bench.meeting(512, estimated_s=0.05)
    assert bench.planner.chunk(meeting, 0, 256) == 0, "it would be there first"
    bench.now_s += 2.0
    assert bench.planner.chunk(meeting, 0, 256) == 256


def test_chunks_end_with_blocks_while_something_loads() -> None:
    bench = Bench()
    meeting = bench.meeting(4096, estimated_s=40.0, front=70)
    assert bench.planner.chunk(meeting, 70, 256) == 0, "the load may show what it can"
    bench.now_s += GRACE_S * 1.01
    assert bench.planner.chunk(meeting, 70, 256) == 250
    assert bench.planner.chunk(meeting, 70, 20) == 0
    meeting.stop()
    assert bench.planner.chunk(meeting, 70, 20) == 20


def test_the_last_block_is_computed_if_the_load_does_not_come() -> None:
    bench = Bench()
    meeting = bench.meeting(4096, estimated_s=0.01, front=4070)
    assert bench.planner.chunk(meeting, 4070, 256) == 0
    bench.now_s += 100
    assert bench.planner.chunk(meeting, 4070, 256) == 26


def test_plans_follow_what_is_measured() -> None:
    bench = Bench()
    assert bench.planner.plan(grant_of(4096), 0).kind == "load"
    ids = as_token_ids(range(256))
    sequence = Sequence(EngineRequest("r", ids, ROOT, (), SamplingParams(1)), Listener(), BLOCK_SIZE, 0.0)
    for _ in range(50):
        bench.speed.note([ScheduledPart(sequence, 256)], 0.02)
    assert bench.planner.plan(grant_of(4096), 0).kind == "both"
    assert bench.planner.plan(grant_of(4096), 4000).load_tokens <= 96


def test_never_loads() -> None:
    assert Bench("compute").planner.never_loads
    assert not Bench("load").planner.never_loads
