"""The bench of the stored dtypes on a tiny model: every figure is there, and they are those of the dtypes."""

from pathlib import Path

import pytest
import torch

from cache.extent import KVShape
from serving.bench.report import Figure
from serving.bench.storage_dtypes import LogitsEffect, measure_storage_dtypes


@pytest.fixture(scope="module")
def figures(tiny_model_dir: Path) -> dict[str, Figure]:
    said: list[str] = []
    measured = measure_storage_dtypes(
        tiny_model_dir, said.append, num_tokens=150, num_continued=16, num_texts=2, rounds=1
    )
    assert len(said) >= 4, "progress is said before each part"
    assert len({figure.name for figure in measured}) == len(measured)
    return {figure.name: figure for figure in measured}


def value(figures: dict[str, Figure], dtype: str, what: str) -> float:
    number = figures[f"stored as {dtype}: {what}"].value
    assert number is not None
    return number


def test_all_figures_of_all_dtypes_are_there(figures: dict[str, Figure]) -> None:
    assert len(figures) == 7 * len(KVShape.DTYPES)
    for dtype in KVShape.DTYPES:
        assert value(figures, dtype, "export") > 0
        assert value(figures, dtype, "import") > 0
    sizes = {dtype: figures[f"stored as {dtype}: a token"].ratio for dtype in KVShape.DTYPES}
    assert sizes == {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5, "float8_e4m3fn": 0.25, "int8": 0.25 * 20 / 16}


def test_the_engine_s_own_dtype_changes_nothing_and_a_coarser_one_changes_more(figures: dict[str, Figure]) -> None:
    for what in ("largest change of a logit", "mean change of a logit", "greedy tokens that change", "KL divergence"):
        assert value(figures, "float32", what) == 0
    means = [
        value(figures, dtype, "mean change of a logit") for dtype in ("float16", "bfloat16", "int8", "float8_e4m3fn")
    ]
    assert 0 < means[0] < means[1] < means[3]
    assert means[0] < means[2] < means[3]
    assert value(figures, "float8_e4m3fn", "KL divergence") > value(figures, "float16", "KL divergence") > 0


def test_the_effect_on_logits_is_what_it_says() -> None:
    exact = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    loaded = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]))
    effect = LogitsEffect.between(exact, loaded)
    log_2 = float(torch.log(torch.tensor(2.0)))
    assert effect.max_abs_diff == pytest.approx(log_2)
    assert effect.mean_abs_diff == pytest.approx(2 * log_2 / 6)
    assert effect.changed_share == 0.5
    assert effect.mean_kl == pytest.approx((0.5 * log_2 - 0.25 * log_2) / 2)


def test_too_long_a_prompt_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="measure shorter prompts"):
        measure_storage_dtypes(tiny_model_dir, num_tokens=10**6, num_texts=1)
