"""What the handoff bench makes of the engines' steps."""

import pytest

from serving.bench.handoff import Timing
from serving.bench.interference import Beside, p99, tokens_per_s
from serving.bench.report import Figure
from serving.bench.stage import draw_prompt
from serving.engine.step_log import StepRecord


def decode_steps(times: list[float], num_sequences: int = 1, seconds: float = 0.05) -> list[StepRecord]:
    return [StepRecord(at - seconds, at, num_sequences, num_sequences) for at in times]


def test_a_handoff_is_timed_from_prefills_end_to_the_first_two_tokens() -> None:
    prefill = [StepRecord(0.0, 0.5, 1, 256), StepRecord(0.5, 1.0, 1, 255)]
    sampled = StepRecord(1.079, 1.08, 1, 0)
    timing = Timing.of(prefill, [sampled, *decode_steps([1.18, 1.24, 1.30, 1.36])])
    assert timing.to_first_token_s == pytest.approx(0.08)
    assert timing.to_second_token_s == pytest.approx(0.10)
    assert timing.gap_s == pytest.approx(0.06)
    assert timing.step_s == pytest.approx(0.05)


def test_steps_that_show_no_handoff_are_refused() -> None:
    prefill = [StepRecord(0.0, 0.5, 1, 256)]
    with pytest.raises(ValueError, match="too few"):
        Timing.of([], decode_steps([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(ValueError, match="too few"):
        Timing.of(prefill, decode_steps([1.0, 2.0]))
    for first in (StepRecord(0.9, 1.0, 1, 32), *decode_steps([1.0])):
        with pytest.raises(ValueError, match="computed a part"):
            Timing.of(prefill, [first, *decode_steps([1.1, 1.2, 1.3])])


def test_only_what_was_beside_prefill_counts() -> None:
    found = Beside(num_streams=2)
    prefill = [StepRecord(1.0, 1.5, 1, 256), StepRecord(1.5, 2.0, 1, 256)]
    before_and_after = decode_steps([0.9, 1.02, 2.01], 2)
    beside = decode_steps([1.1, 1.2, 1.3, 1.9], 2)
    of_the_long_prompt = [StepRecord(1.3, 1.4, 3, 3)]
    found.add(sorted([*before_and_after, *beside, *of_the_long_prompt], key=lambda s: s.ended_at), prefill)
    assert len(found.step_s) == 4
    assert found.gap_s == pytest.approx([0.1, 0.1, 0.1, 0.5]), "every step with all the streams gives them a token"
    assert found.prefill_tokens_per_s == pytest.approx(512)


def test_gaps_do_not_reach_from_round_to_round() -> None:
    found = Beside(num_streams=1)
    for start in (0.0, 100.0):
        prefill = [StepRecord(start, start + 1, 1, 64)]
        found.add(decode_steps([start + 0.2, start + 0.4]), prefill)
    assert found.gap_s == pytest.approx([0.2, 0.2])


def test_a_combined_replicas_steps_are_gaps_too() -> None:
    found = Beside(num_streams=2)
    steps = [StepRecord(at, at + 1.0, 3, 256) for at in (0.0, 1.0, 2.0)]
    found.add(steps, steps)
    assert found.step_s == []
    assert found.gap_s == pytest.approx([1.0, 1.0])


def test_summaries() -> None:
    assert p99([1.0] * 98 + [5.0] * 2) == pytest.approx(5.0)
    assert tokens_per_s([StepRecord(0.0, 1.0, 1, 100), StepRecord(1.5, 2.0, 1, 100)]) == pytest.approx(100)
    assert not Figure("gap", 90.0, "ms", "combined", 400.0, 0.2, lower_is_better=True).ok


def test_each_prompt_is_another_one() -> None:
    assert draw_prompt(100, 1).tolist() == draw_prompt(100, 1).tolist()
    drawn = {tuple(draw_prompt(100, seed)) for seed in range(-5, 6)} | {tuple(draw_prompt(101, 1)[:100])}
    assert len(drawn) == 12
