"""The parity matrix: every answer of one busy life of an engine, cell by cell, is the oracle's.

A cell is a family, a block size and a step size. Its life: conversations of random lengths, so that turns end and
prompts fork anywhere in a block, in batches of mixed sizes, in a pool that holds about two thirds of a batch and
therefore preempts, over a warehouse whose memory holds less than the rest; then the same turns once more in a new
engine, from disk. Reuse is asserted, too: a matrix of recomputed answers would prove nothing.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from serving.protocol import SamplingParams
from tests.oracle import Oracle
from tests.serving.engine.harness import Answer, EngineUnderTest, make_engine, open_store, prompt_of, running
from tests.tiny_models import FAMILIES, build_tiny_model

NUM_TURNS = 3
MAX_TOKENS = 10


@dataclass
class Life:
    """Conversations and what was asked of them."""

    oracle: Oracle
    rng: random.Random
    histories: list[list[int]] = field(default_factory=list)
    asked: list[list[int]] = field(default_factory=list)

    def begin(self, num_histories: int, most_tokens: int) -> None:
        for _ in range(num_histories):
            self.histories.append(prompt_of(self.rng.randint(1, most_tokens), seed=self.rng.randrange(1 << 30)))

    def fork(self) -> None:
        """A conversation that goes another way from somewhere in the middle of one that is there."""
        source = self.rng.choice(self.histories)
        shared = source[: self.rng.randint(1, len(source))]
        self.histories.append(shared + prompt_of(self.rng.randint(1, 9), seed=self.rng.randrange(1 << 30)))

    def play(self, engine: EngineUnderTest) -> None:
        """One turn of every conversation, all at once."""
        self.asked += [list(history) for history in self.histories]
        for history, answer in zip(self.histories, ask(engine, self.histories), strict=True):
            self.oracle.check(history, answer.token_ids, MAX_TOKENS)
            history += answer.token_ids
            history += prompt_of(self.rng.randint(1, 9), seed=self.rng.randrange(1 << 30))


def ask(engine: EngineUnderTest, prompts: list[list[int]]) -> list[Answer]:
    pending = [engine.submit(prompt, SamplingParams(MAX_TOKENS, temperature=0.0)) for prompt in prompts]
    return [each.wait() for each in pending]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Oracle]]:
    folder = tmp_path_factory.mktemp("matrix")
    dirs = {family: build_tiny_model(folder / family, family=family, seed=2) for family in FAMILIES}
    return {family: (model_dir, Oracle(model_dir)) for family, model_dir in dirs.items()}


CELLS = [("llama", step, block) for step in (9, 32, 256) for block in (16, 32, 64)]
CELLS += [(family, 32, block) for family in FAMILIES if family != "llama" for block in (16, 32, 64)]
"""Sizes change what is scheduled and stored, families only what is computed."""


@pytest.mark.parametrize(("family", "step_tokens", "block_size"), CELLS)
def test_every_answer_of_a_life(
    oracles: dict[str, tuple[Path, Oracle]], tmp_path: Path, family: str, step_tokens: int, block_size: int
) -> None:
    model_dir, oracle = oracles[family]
    life = Life(oracle, random.Random(f"{family} {step_tokens}"))
    life.begin(4, 100)
    dram_bytes = 1 << 18
    with open_store(tmp_path, dram_bytes=dram_bytes) as store:
        engine = make_engine(
            model_dir, store, block_size=block_size, num_blocks=320 // block_size, step_tokens=step_tokens
        )
        with running(engine) as busy:
            for _ in range(NUM_TURNS):
                life.play(busy)
                life.fork()
            assert busy.engine.counters["device_tokens"] + busy.engine.counters["disk_tokens"] > 0
    with open_store(tmp_path, dram_bytes=dram_bytes) as store:
        later = make_engine(model_dir, store, block_size=block_size, num_blocks=640 // block_size, replica_id="later")
        with running(later) as again:
            for prompt, answer in zip(life.asked, ask(again, life.asked), strict=True):
                oracle.check(prompt, answer.token_ids, MAX_TOKENS)
            assert again.engine.counters["disk_tokens"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_may_be_as_long_as_the_model_says(
    oracles: dict[str, tuple[Path, Oracle]], tmp_path: Path, family: str
) -> None:
    model_dir, oracle = oracles[family]
    with open_store(tmp_path) as store, running(make_engine(model_dir, store, num_blocks=4096 // 16)) as engine:
        limit = engine.engine.max_request_tokens
        prompt = prompt_of(limit - MAX_TOKENS, seed=5)
        for num_cached in (0, len(prompt) - 1):
            answer = engine.greedy(prompt, MAX_TOKENS)
            oracle.check(prompt, answer.token_ids, MAX_TOKENS)
            assert answer.cost.cached_tokens == num_cached
