"""The bench of smaller weights on a tiny model: every figure is there, in the order that they must be in."""

from pathlib import Path

import pytest

from serving.bench.report import Figure
from serving.bench.weights import KINDS, WeightsBenchOptions, run_weights_bench


@pytest.fixture(scope="module")
def figures(tiny_model_dir: Path) -> dict[str, Figure]:
    said: list[str] = []
    options = WeightsBenchOptions(
        tiny_model_dir, (1,), (1, 3), decode_tokens=6, rounds=1, num_texts=2, text_tokens=100, continued_tokens=50
    )
    report = run_weights_bench(options, said.append)
    assert len(said) == 1 + 2 + 2, "progress is said before each part"
    assert len({figure.name for figure in report.figures}) == len(report.figures)
    return {figure.name: figure for figure in report.figures}


def values(figures: dict[str, Figure], what: str) -> list[float]:
    found = [figures[f"{kind}: {what}"].value for kind in KINDS]
    assert None not in found
    return [value for value in found if value is not None]


def test_smaller_weights_are_smaller_and_farther_off(figures: dict[str, Figure]) -> None:
    assert len(figures) == 3 * (1 + 2 + 3)
    sizes = values(figures, "weights")
    assert sizes[0] == 2 * sizes[1] > 2 * sizes[2]
    assert figures["bf16: weights"].ratio == 0.5
    for what in ("KL divergence", "mean change of a logit"):
        exact, bf16, int4 = values(figures, what)
        assert exact == 0 < bf16 < int4
    assert values(figures, "greedy tokens that change")[0] == 0


def test_each_kind_has_a_time_for_each_batch(figures: dict[str, Figure]) -> None:
    for batch in ("1 sequence", "3 sequences"):
        assert all(value > 0 for value in values(figures, f"decode step, {batch}, 1 thread"))


def test_too_long_a_text_is_refused(tiny_model_dir: Path) -> None:
    options = WeightsBenchOptions(tiny_model_dir, (), (1,), text_tokens=10**6)
    with pytest.raises(ValueError, match="measure shorter prompts"):
        run_weights_bench(options, lambda _: None)
