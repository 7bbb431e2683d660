"""The warm turn's figures on a tiny model: what is loaded comes from where the figure says."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cache.events import Tier
from serving.bench.warm_turn import WarmTurnBench, WarmTurnOptions, measure_warm_turns
from serving.engine.runner import ModelRunner

OPTIONS = WarmTurnOptions(1, prefix_tokens=256, new_tokens=32, rounds=1, chunk_tokens=64)


def test_both_tiers_are_held_against_their_limit(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    options = WarmTurnOptions(1, 256, 32, rounds=2, chunk_tokens=64, folder=tmp_path)
    figures = measure_warm_turns(ModelRunner(tiny_model_dir), tokenizer, options)
    assert [figure.target for figure in figures if figure.target is not None] == [1.15, 1.2]
    for figure in figures:
        assert figure.value is not None
        assert figure.value > 0
    for turn, new, _ in (figures[:3], figures[3:]):
        assert turn.against_value is not None
        assert new.value is not None
        assert turn.against_value > new.value, "the limit holds the bytes beside the new tokens"
    assert not any(tmp_path.iterdir()), "nothing is left behind"


def test_from_disk_without_anything_there_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    bench = WarmTurnBench(ModelRunner(tiny_model_dir), tokenizer, OPTIONS, tmp_path)
    with pytest.raises(OSError, match="did not take the prefix"):
        bench.measure(Tier.DISK)
