"""An engine over a store that brings blocks at the test's pace, and holds what other engines have left."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cache.client import WarehouseClient
from cache.errors import StoreUnavailable
from cache.extent import Image, parse_header
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.memory import MemoryTier
from serving.engine.engine import Engine, EngineConfig
from serving.engine.planner import LoadMode
from serving.engine.runner import ModelRunner
from serving.engine.step_batch import StepBatch
from tests.serving.engine.harness import Answer, EngineUnderTest, prompt_of, running

TIMEOUT_S = 30.0
BLOCK_S = 0.003
"""A block takes so long to come: neither clearly faster nor clearly slower than the tiny model computes it."""


@dataclass
class Pace:
    """Brings images to a client as the test allows it, each of one block, and slowly."""

    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    is_free: threading.Event = field(default_factory=threading.Event)
    spoil: Callable[[int], bool] = lambda block: False
    """Whether a block comes damaged."""
    lose: Callable[[int], bool] = lambda block: False
    """Whether a block, and the store with it, has gone."""
    brought: list[int] = field(default_factory=list)

    def allow(self, num_blocks: int) -> None:
        for _ in range(num_blocks):
            self.permits.release()

    def fetch(self, source: Image) -> Image:
        while not self.is_free.is_set() and not self.permits.acquire(timeout=0.01):
            pass
        time.sleep(BLOCK_S)
        block = parse_header(source).header.first_block
        if self.lose(block):
            raise StoreUnavailable("gone")
        self.brought.append(block)
        if not self.spoil(block):
            return source
        damaged = source.copy()
        damaged[-1] ^= 1
        return damaged


class SteppedRunner(ModelRunner):
    """A model whose steps can be held back."""

    may_step: threading.Semaphore | None = None

    def forward(self, batch: StepBatch) -> Any:
        permits = self.may_step
        if permits is not None:
            assert permits.acquire(timeout=TIMEOUT_S)
        return super().forward(batch)


@dataclass
class Bench:
    """An engine over a store that holds what the engines before it have left."""

    engine: EngineUnderTest
    store: NodeStore
    pace: Pace
    runner: SteppedRunner

    def counters(self) -> dict[str, int]:
        self.engine.engine.check_integrity()
        return dict(self.engine.engine.counters)

    def check_conserved(self, answer: Answer) -> tuple[int, int]:
        """Nothing is computed twice and nothing is left out; returns the tokens loaded and computed."""
        cost, counters = answer.cost, self.counters()
        loaded, computed = counters.get("loaded_tokens", 0), counters["computed_prompt_tokens"]
        assert cost.device_tokens + loaded + computed == cost.prompt_tokens
        assert cost.dram_tokens == loaded
        assert cost.decode_computed_tokens == computed
        return loaded, computed


def open_block_store(model_dir: Path, block_size: int) -> NodeStore:
    """In memory, an extent for each block."""
    block_bytes = ModelRunner(model_dir).layout(block_size).block_bytes
    budgets = Budgets(64 << 20, 0, 64 << 20, extent_max_bytes=block_bytes, max_extents_per_grant=64)
    return NodeStore(NodeStoreConfig(budgets, store_wait_s=0.0), MemoryTier(), None)


def engine_of(
    runner: ModelRunner, store: NodeStore, pace: Pace, block_size: int, plan: LoadMode, num_blocks: int, name: str
) -> Engine:
    config = EngineConfig(
        "decode",
        name,
        num_blocks,
        block_size=block_size,
        step_tokens=2 * block_size,
        max_running=8,
        remote_threshold_tokens=3 * block_size,
        load_plan=plan,
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(runner.model_dir)
    return Engine(runner, config, tokenizer, lambda node_id: WarehouseClient(store, fetch=pace.fetch))


@contextmanager
def bench(
    model_dir: Path,
    histories: list[list[int]],
    *,
    block_size: int = 16,
    plan: LoadMode = "auto",
    num_blocks: int = 128,
    knows_speeds: bool = True,
) -> Iterator[Bench]:
    """An engine whose store holds `histories`. It has measured that loading and computing are about as fast."""
    pace, runner = Pace(), SteppedRunner(model_dir)
    with open_block_store(model_dir, block_size) as store:
        primer = prompt_of(block_size * 12, seed=99)
        with running(engine_of(runner, store, pace, block_size, "compute", num_blocks, "writer")) as writer:
            for history in [*histories, primer]:
                writer.greedy(history, 1)
        engine = engine_of(runner, store, pace, block_size, plan, num_blocks, "reader")
        with running(engine) as under_test:
            pace.is_free.set()
            if knows_speeds:
                under_test.greedy(prompt_of(block_size * 6, seed=98), 2)
                under_test.greedy(primer, 2)
                under_test.engine.reset_counters()
            pace.is_free.clear()
            pace.brought.clear()
            try:
                yield Bench(under_test, store, pace, runner)
            finally:
                runner.may_step = None
                pace.is_free.set()
        store.check_integrity()
