"""The cost of a cache that never helps, on a tiny model: the turns are really kept on the one side."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from serving.bench.cache_cost import CacheCostOptions, measure_cache_cost
from serving.engine.runner import ModelRunner


def test_both_sides_are_measured(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    options = CacheCostOptions(1, 3, 64, decode_tokens=8, rounds=2, chunk_tokens=64, folder=tmp_path)
    assert options.num_tokens == 3 * 72
    (figure,) = measure_cache_cost(ModelRunner(tiny_model_dir), tokenizer, options)
    assert figure.target == 1.03
    assert figure.lower_is_better
    assert figure.ratio is not None
    assert figure.ratio > 0
    assert not any(tmp_path.iterdir())
