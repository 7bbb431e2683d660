"""The cost of steps is found again from steps, whatever the machine's speed, and a few slow ones don't spoil it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.step_cost import StepCost, StepCostFit, num_attended

STEP_TOKENS = 256


def prefill(fit: StepCostFit, cost: StepCost, num_tokens: int, rng: random.Random, hiccups: float = 0.0) -> None:
    """One prompt in steps, with noise of 5 %; a part of the steps takes five times as long."""
    for first in range(0, num_tokens, STEP_TOKENS):
        count = min(STEP_TOKENS, num_tokens - first)
        seconds = cost.seconds(count, first) * rng.uniform(0.95, 1.05)
        fit.note(count, num_attended(count, first), seconds * (5 if rng.random() < hiccups else 1))


def test_assumptions_until_the_first_step() -> None:
    fit = StepCostFit()
    assert not fit.is_measured
    assert fit.cost == StepCost()


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-3, 30), st.integers(1, 256), st.integers(0, 8000))
def test_after_one_step_its_time_is_known_at_any_speed(factor: float, num_tokens: int, first: int) -> None:
    fit = StepCostFit()
    seconds = StepCost().seconds(num_tokens, first) * factor
    fit.note(num_tokens, num_attended(num_tokens, first), seconds)
    assert fit.cost.seconds(num_tokens, first) == pytest.approx(seconds)
    assert min(fit.cost.step_s, fit.cost.token_s, fit.cost.position_s) > 0


@pytest.mark.parametrize(
    "true",
    [StepCost(), StepCost(0.06, 2.5e-3, 2e-7), StepCost(0.002, 2e-5, 2e-9), StepCost(0.01, 4e-3, 2e-6)],
    ids=["as assumed", "little attention", "accelerator", "much attention"],
)
@pytest.mark.parametrize("hiccups", [0.0, 0.1])
def test_prompts_of_several_lengths_tell_the_parts_apart(true: StepCost, hiccups: float) -> None:
    fit, rng = StepCostFit(), random.Random(0)
    for num_tokens in (300, 4000, 40, 700, 90, 2500):
        prefill(fit, true, num_tokens, rng, hiccups)
    for num_tokens, first in ((256, 0), (256, 4000), (256, 7600), (32, 500), (100, 3000)):
        assert fit.cost.seconds(num_tokens, first) == pytest.approx(true.seconds(num_tokens, first), rel=0.3)


def test_a_change_of_speed_is_followed() -> None:
    fit, rng = StepCostFit(), random.Random(0)
    before, after = StepCost(), StepCost(0.06, 3e-3, 1.2e-6)
    for cost in (before, after, before):
        for _ in range(6):
            prefill(fit, cost, 4000, rng)
        assert fit.cost.seconds(256, 2000) == pytest.approx(cost.seconds(256, 2000), rel=0.15)


def test_speed_at_the_beginning_holds_the_steps_own_cost() -> None:
    assert StepCost(0.1, 1e-3, 1.0).tokens_per_s(100) == pytest.approx(500)
