"""Prompts sent to a real engine: their times, and what a failed one says."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from serving.bench.turns import Timing, ask, random_tokens
from serving.engine.engine import Engine, EngineConfig
from serving.engine.runner import ModelRunner


@pytest.fixture
def engine(tiny_model_dir: Path) -> Iterator[Engine]:
    config = EngineConfig("decode", "turns", num_blocks=64, block_size=16, step_tokens=64)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    engine = Engine(ModelRunner(tiny_model_dir), config, tokenizer)
    engine.start()
    yield engine
    engine.stop()


def test_every_sequence_has_a_time_for_each_token(engine: Engine) -> None:
    prompts = [random_tokens(40, 300) for _ in range(3)]
    timing = ask(engine, prompts, 6)
    assert [len(times) for times in timing.times] == [6, 6, 6]
    assert all(times == sorted(times) for times in timing.times)
    assert [usage.completion_tokens for usage in timing.usages] == [6, 6, 6]
    assert timing.first_token_s == min(times[0] for times in timing.times) > 0


def test_nothing_is_reused_without_a_root(engine: Engine) -> None:
    prompt = random_tokens(64, 300)
    for _ in range(2):
        usage = ask(engine, [prompt], 1).usages[0]
        assert usage.decode_computed_tokens == 64


def test_a_failed_request_is_no_figure(engine: Engine) -> None:
    threading.Timer(0.05, engine.stop).start()
    with pytest.raises(RuntimeError, match="the engine failed a request: the engine is shutting down"):
        ask(engine, [random_tokens(20, 300)], 1000)


def test_a_seed_names_a_prompt_and_without_one_each_is_new() -> None:
    assert (random_tokens(100, 300, seed=1) == random_tokens(100, 300, seed=1)).all()
    assert (random_tokens(100, 300) != random_tokens(100, 300)).any()
    assert random_tokens(1000, 300).min() >= 10


def test_a_step_is_one_in_which_all_sequences_decode() -> None:
    timing = Timing([[1.0, 2.0, 2.5, 3.0, 3.5], [2.0, 2.4, 2.9, 3.4, 3.9, 9.0]], [])
    assert timing.step_s == pytest.approx(0.5)
