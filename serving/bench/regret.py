"""`tokenloft bench regret`: how far a plan is from the better of loading everything and computing everything.

A prefix lies in the dram tier behind a link that is throttled, or not. A prompt that continues it comes to three
engines in turn, over one model and one warehouse: one plans as the server does, one only loads, one only computes.
Each has to bring the prefix anew: its pool is emptied before.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from cache.client import WarehouseClient
from cache.extent import Image
from cache.hashing import BlockHash, TokenIds
from cache.messages import PurgeQuery
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.memory import MemoryTier
from serving.bench.report import Figure, Report, interleaved
from serving.bench.turns import ask, random_tokens
from serving.engine.engine import Engine, EngineConfig
from serving.engine.planner import LoadMode
from serving.engine.runner import ModelRunner, set_num_threads
from serving.protocol import Usage

BLOCK_SIZE = 32
NEW_TOKENS = 32
"""Behind the prefix, to be computed in any case."""
ROOT = BlockHash(b"tokenloft regret")
MODES: tuple[LoadMode, ...] = ("auto", "load", "compute")
_EXTENT_BYTES = 4_000_000
"""What the link brings at a time: as much as is read from a file at a time."""


@dataclass(frozen=True, slots=True)
class RegretBenchOptions:
    """What to measure and how long."""

    model_dir: Path
    num_threads: int
    prefix_tokens: tuple[int, ...] = (512, 2048, 7680)
    link_bytes_per_s: tuple[float | None, ...] = (20e6, 100e6, None)
    """None: as fast as the memory."""
    rounds: int = 5
    chunk_tokens: int = 256

    @classmethod
    def of(cls, model_dir: Path, *, num_threads: int | None, is_quick: bool) -> "RegretBenchOptions":
        """The full bench takes about a quarter of an hour on two cores, the quick one about one minute."""
        num_threads = num_threads or len(os.sched_getaffinity(0))
        if is_quick:
            return cls(model_dir, num_threads, (512, 1024), (20e6, None), rounds=1)
        return cls(model_dir, num_threads)


class Link:
    """Brings images no faster than it is told, whoever asks for them."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._lock = threading.Lock()
        self._free_at = 0.0

    def fetch(self, image: Image) -> Image:
        """As a client's `fetch`."""
        if self.bytes_per_s is not None:
            with self._lock:
                self._free_at = max(self._free_at, time.perf_counter()) + len(image) / self.bytes_per_s
                free_at = self._free_at
            time.sleep(max(0.0, free_at - time.perf_counter()))
        return image

    def wait(self) -> None:
        """Until it brings nothing any more."""
        time.sleep(max(0.0, self._free_at - time.perf_counter()))


def run_regret_bench(options: RegretBenchOptions, progress: Callable[[str], None]) -> Report:
    """Store the prefix, then measure every link with every length."""
    started = time.perf_counter()
    report = Report("regret")
    progress("computing and storing the prefix")
    with _open_bench(options) as bench:
        for bytes_per_s in options.link_bytes_per_s:
            bench.link.bytes_per_s = bytes_per_s
            bench.learn()
            for num_tokens in options.prefix_tokens:
                progress(f"{num_tokens:,} tokens, {_named(bytes_per_s)}")
                report.figures += bench.measure(num_tokens, options.rounds, _named(bytes_per_s))
    report.figures += summarise(report.figures)
    report.seconds = time.perf_counter() - started
    return report


class RegretBench:
    """Three engines and the warehouse that they share."""

    def __init__(self, engines: dict[LoadMode, Engine], link: Link, prefix: TokenIds, vocab_size: int) -> None:
        self.link = link
        self._engines = engines
        self._prefix = prefix
        self._vocab_size = vocab_size

    def store_prefix(self) -> None:
        """Have the prefix computed, and committed at the end of its turn."""
        self._ask("compute", self._prefix)
        self._forget("compute")

    def learn(self) -> None:
        """Let the engines measure a link that has changed."""
        for mode in MODES:
            self._ask(mode, self._prompt(min(2048, len(self._prefix))))
            self._forget(mode)

    def measure(self, num_tokens: int, rounds: int, link: str) -> list[Figure]:
        """The three in turn."""
        runs: dict[str, Callable[[], float]] = {mode: partial(self._first_token_s, mode, num_tokens) for mode in MODES}
        seconds = interleaved(runs, rounds)
        better = "load" if seconds["load"] <= seconds["compute"] else "compute"
        name = f"{num_tokens:,} tokens, {link}"
        return [
            Figure(name, seconds["auto"], "s", f"{better} alone", seconds[better], 1.25, lower_is_better=True),
            Figure(f"{name}: load alone", seconds["load"], "s"),
            Figure(f"{name}: compute alone", seconds["compute"], "s"),
        ]

    def _first_token_s(self, mode: LoadMode, num_tokens: int) -> float:
        usage = self._ask(mode, self._prompt(num_tokens))
        self._forget(mode)
        self.link.wait()  # what an ended load had asked for must not hold up the next one
        return usage.ttft_s

    def _prompt(self, num_tokens: int) -> TokenIds:
        return np.concatenate([self._prefix[:num_tokens], random_tokens(NEW_TOKENS, self._vocab_size)])

    def _ask(self, mode: LoadMode, prompt: TokenIds) -> Usage:
        return ask(self._engines[mode], [prompt], 1, ROOT).usages[0]

    def _forget(self, mode: LoadMode) -> None:
        """Empty the pool, when the turn has been stored."""
        self._engines[mode].purge(PurgeQuery(root_hash=ROOT)).result()


@contextmanager
def _open_bench(options: RegretBenchOptions) -> Iterator[RegretBench]:
    set_num_threads(1)  # the step loops alone compute with more: see `peers.peer`
    runner = ModelRunner(options.model_dir)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    link, longest = Link(), max(options.prefix_tokens)
    num_bytes = 2 * longest * runner.layout(BLOCK_SIZE).bytes_per_token
    budgets = Budgets(num_bytes, 0, 0, extent_max_bytes=_EXTENT_BYTES)
    prefix = random_tokens(longest, runner.vocab_size, seed=0)
    with ExitStack() as opened:
        store = opened.enter_context(NodeStore(NodeStoreConfig(budgets), MemoryTier(), None))
        engines: dict[LoadMode, Engine] = {}
        for mode in MODES:
            config = EngineConfig(
                "decode",
                mode,
                num_blocks=longest // BLOCK_SIZE + 4,
                block_size=BLOCK_SIZE,
                step_tokens=options.chunk_tokens,
                num_threads=options.num_threads,
                load_plan=mode,
            )
            engine = Engine(runner, config, tokenizer, lambda node_id: WarehouseClient(store, fetch=link.fetch))
            engines[mode] = opened.enter_context(engine)
        bench = RegretBench(engines, link, prefix, runner.vocab_size)
        bench.store_prefix()
        yield bench


def summarise(figures: list[Figure]) -> list[Figure]:
    """The median and the extremes of all cells; where both ends help, the best one is clearly under 1."""
    ratios = [figure.ratio for figure in figures if figure.ratio is not None]
    of = "the better one"
    return [
        Figure("median of all", statistics.median(ratios), "x", of, 1.0, 1.05, lower_is_better=True),
        Figure("worst of all", max(ratios), "x", of, 1.0, 1.25, lower_is_better=True),
        Figure("best of all", min(ratios), "x", of, 1.0, 0.95, lower_is_better=True),
    ]


def _named(bytes_per_s: float | None) -> str:
    return "unlimited" if bytes_per_s is None else f"{bytes_per_s / 1e6:.0f} MB/s"
