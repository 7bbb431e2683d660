"""The plan is never worse than either of the two ways, by the estimates it is made from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.events import Tier
from cache.messages import LoadPiece
from router.cost import CostModel
from serving.engine.load_plan import (
    COMPUTES_CLEARLY_FASTER,
    LOADS_CLEARLY_FASTER,
    Stretch,
    plan_load,
    stretches,
)

BLOCK_SIZE = 32
KV_BYTES = 46_080

stored_tokens = st.lists(st.tuples(st.sampled_from([Tier.DRAM, Tier.DISK]), st.integers(1, 4000)), max_size=4)
speeds = st.floats(1e-3, 1e3)


def costs_of(dram: float = 1.0, disk: float = 1.0, prefill: float = 1.0, attention: float = 1.0) -> CostModel:
    """Speeds as multiples of usual ones."""
    return CostModel(
        KV_BYTES, 500 * prefill, 6e-7 * attention, dram_bytes_per_s=4e9 * dram, disk_bytes_per_s=1e9 * disk
    )


def seconds_alone(stored: list[Stretch], first: int, costs: CostModel) -> tuple[float, float]:
    num_tokens = sum(count for _, count in stored)
    return sum(costs.seconds_to_load(*each) for each in stored), costs.seconds_to_compute(num_tokens, first)


@given(stored_tokens, st.integers(0, 3000), speeds, speeds, speeds, st.floats(0, 10))
def test_no_plan_is_worse_than_either_way_alone(
    stored: list[Stretch], first: int, dram: float, disk: float, prefill: float, attention: float
) -> None:
    costs = costs_of(dram, disk, prefill, attention)
    plan = plan_load(stored, first, BLOCK_SIZE, costs)
    load_s, compute_s = seconds_alone(stored, first, costs)
    assert plan.estimated_s <= min(load_s, compute_s) * (1 + 1e-9)
    assert plan.load_tokens + plan.compute_tokens == sum(count for _, count in stored)
    assert min(plan.load_tokens, plan.compute_tokens) >= 0
    if plan.kind == "load":
        assert (plan.compute_tokens, plan.estimated_s) == (0, load_s)
        assert load_s * LOADS_CLEARLY_FASTER <= compute_s
    elif plan.kind == "compute":
        assert (plan.load_tokens, plan.estimated_s) == (0, compute_s)
        assert compute_s * COMPUTES_CLEARLY_FASTER <= load_s
    elif plan.load_tokens:
        assert (first + plan.compute_tokens) % BLOCK_SIZE == 0 or plan.compute_tokens == 0, "blocks are loaded whole"


@given(stored_tokens, st.integers(0, 3000), speeds, st.floats(1, 10))
def test_the_faster_the_tier_the_more_is_loaded(stored: list[Stretch], first: int, disk: float, faster: float) -> None:
    slow = plan_load(stored, first, BLOCK_SIZE, costs_of(disk, disk))
    fast = plan_load(stored, first, BLOCK_SIZE, costs_of(disk * faster, disk * faster))
    assert fast.load_tokens >= slow.load_tokens


@given(st.integers(1, 8000), st.integers(0, 3000), speeds, st.floats(1, 10))
def test_the_faster_the_prefill_the_more_is_computed(
    num_tokens: int, first: int, prefill: float, faster: float
) -> None:
    stored: list[Stretch] = [(Tier.DISK, num_tokens)]
    slow = plan_load(stored, first, BLOCK_SIZE, costs_of(prefill=prefill))
    fast = plan_load(stored, first, BLOCK_SIZE, costs_of(prefill=prefill * faster))
    assert fast.compute_tokens >= slow.compute_tokens


def test_as_long_as_both_are_the_bottleneck_they_share_the_work() -> None:
    costs = CostModel(KV_BYTES, 434.0, disk_bytes_per_s=434.0 * KV_BYTES)
    plan = plan_load([(Tier.DISK, 7680)], 0, BLOCK_SIZE, costs)
    assert (plan.kind, plan.load_tokens, plan.compute_tokens) == ("both", 3840, 3840)
    assert plan.estimated_s == pytest.approx(0.5 * 7680 / 434)


def test_what_is_computed_is_the_slow_tiers_part_if_that_comes_first() -> None:
    costs = costs_of(disk=0.02)
    plan = plan_load([(Tier.DISK, 3200), (Tier.DRAM, 3200)], 0, BLOCK_SIZE, costs)
    load_s = costs.seconds_to_load(Tier.DISK, 3200 - plan.compute_tokens) + costs.seconds_to_load(Tier.DRAM, 3200)
    assert plan.kind == "both"
    assert plan.estimated_s == pytest.approx(max(load_s, costs.seconds_to_compute(plan.compute_tokens)))


def test_nothing_stored_is_an_empty_load() -> None:
    assert plan_load([], 100, BLOCK_SIZE, costs_of()).load_tokens == 0


def test_stretches_begin_behind_what_is_there() -> None:
    pieces = [
        LoadPiece("a", Tier.DRAM, 2, 96, 0, None),
        LoadPiece("b", Tier.DISK, 5, 40, 0, None),
    ]
    assert stretches(pieces, 70, BLOCK_SIZE) == [(Tier.DRAM, 90), (Tier.DISK, 40)]
    assert stretches(pieces, 160, BLOCK_SIZE) == [(Tier.DISK, 40)]
    assert stretches(pieces, 200, BLOCK_SIZE) == []
