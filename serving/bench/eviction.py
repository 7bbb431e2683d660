"""`tokenloft bench eviction`: token hit rates of the eviction policies on a trace, without a model.

Every request goes through the ledger that the node store decides with: a lookup of its prompt, then a store of
the blocks that it lacks. One block is one extent, and everything is in dram, so the budget is the number of blocks.
Beside them: a cache without bounds, and one that knows the future (OPT).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.eviction import POLICIES, EvictionPolicy, PolicyName
from cache.extent import ExtentHeader, KVShape
from cache.hashing import HASH_BYTES, BlockHash
from cache.ledger import Ledger
from cache.messages import LoadQuery, StoreOffer
from cache.occupancy import Budgets
from serving.bench.block_trace import TraceRequest, best_hit_rate, endless_hit_rate, load_trace, share
from serving.bench.report import Figure, Report

OURS: PolicyName = "reuse"
SIZES = (300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
JUDGED = (1_000_000, 3_000_000, 10_000_000)
"""Sizes over which the share of the way from LRU to OPT is averaged."""
TARGET = 0.15
QUICK_SIZES = (1_000_000,)
QUICK_REQUESTS = 2000

_SHAPE = KVShape(num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32")
_ROOT = BlockHash(b"\xff" * HASH_BYTES)
"""Hash of no block: those are their numbers."""
_SAY_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class EvictionBenchOptions:
    """Which trace, and the sizes in tokens."""

    trace: Path
    sizes: tuple[int, ...] = SIZES
    block_size: int = 512
    max_requests: int | None = None
    plot_dir: Path | None = None

    @classmethod
    def of(
        cls,
        trace: Path,
        sizes: tuple[int, ...] | None,
        block_size: int,
        *,
        plot_dir: Path | None = None,
        is_quick: bool = False,
    ) -> "EvictionBenchOptions":
        """With the sizes that suit, unless they are given."""
        max_requests = QUICK_REQUESTS if is_quick else None
        return cls(trace, sizes or (QUICK_SIZES if is_quick else SIZES), block_size, max_requests, plot_dir)


@dataclass(frozen=True, slots=True)
class SizeResult:
    """Token hit rates at one size."""

    num_tokens: int
    rates: dict[PolicyName, float]
    opt: float
    endless: float

    def closed(self, policy: PolicyName) -> float | None:
        """Share of the way from LRU to OPT; None if there is no way to go."""
        way = self.opt - self.rates["lru"]
        return (self.rates[policy] - self.rates["lru"]) / way if way > 0 else None


def run_eviction_bench(options: EvictionBenchOptions, progress: Callable[[str], None]) -> Report:
    """Replay the trace with each policy at each size. Raises BenchError for a trace that can't be read."""
    started = time.perf_counter()
    requests = load_trace(options.trace, options.block_size, options.max_requests)
    progress(f"{len(requests):,} requests of {options.trace.name}")
    endless = endless_hit_rate(requests, options.block_size)
    results: list[SizeResult] = []
    for num_tokens in options.sizes:
        num_blocks = num_tokens // options.block_size
        rates: dict[PolicyName, float] = {}
        for name, make_policy in POLICIES.items():
            progress(f"{size_name(num_tokens)} tokens, {name}")
            rates[name] = Replay(num_blocks, options.block_size, make_policy).run(requests, progress)
        results.append(SizeResult(num_tokens, rates, best_hit_rate(requests, options.block_size, num_blocks), endless))
    report = Report("eviction", figures_of(results))
    if options.plot_dir is not None:
        progress(f"wrote {_plot(results, options.plot_dir)}")
    report.seconds = time.perf_counter() - started
    return report


def _plot(results: Sequence[SizeResult], directory: Path) -> Path:
    from serving.bench.eviction_plot import plot_hit_rates  # matplotlib: only who plots needs it

    curves: dict[str, list[float]] = {name: [result.rates[name] for result in results] for name in POLICIES}
    curves |= {"OPT": [result.opt for result in results], "infinite": [result.endless for result in results]}
    return plot_hit_rates([result.num_tokens for result in results], curves, directory)


def size_name(num_tokens: int) -> str:
    """`0.3M`, `10M`."""
    return f"{num_tokens / 1e6:g}M" if num_tokens >= 100_000 else f"{num_tokens}"


def figures_of(results: Sequence[SizeResult]) -> list[Figure]:
    """Rates beside OPT, and how much of the way from LRU to OPT each policy goes."""
    figures: list[Figure] = []
    for result in results:
        size = size_name(result.num_tokens)
        for name, rate in result.rates.items():
            figures.append(Figure(f"hit rate {size}, {name}", 100 * rate, "%", "OPT", 100 * result.opt))
        figures.append(Figure(f"hit rate {size}, OPT", 100 * result.opt, "%", "infinite", 100 * result.endless))
        figures += [_closed_figure(result, name) for name in result.rates if name != "lru"]
    least = min(100 * (result.rates[OURS] - result.rates["lru"]) for result in results)
    figures.append(Figure(f"above LRU at the worst size, {OURS}", least, "points"))
    return [*figures, _average_figure(results)]


def _average_figure(results: Sequence[SizeResult]) -> Figure:
    closed = [c for r in results if r.num_tokens in JUDGED and (c := r.closed(OURS)) is not None]
    name = f"closed distance average, {OURS}"
    if closed:
        return Figure(name, statistics.mean(closed), "of LRU to OPT", "OPT", 1.0, TARGET)
    reason = "no size of 1, 3 and 10 million at which OPT is above LRU"
    return Figure(name, None, "of LRU to OPT", "OPT", 1.0, TARGET, reason=reason)


def _closed_figure(result: SizeResult, policy: PolicyName) -> Figure:
    closed = result.closed(policy)
    reason = "OPT is not above LRU" if closed is None else None
    name = f"closed distance {size_name(result.num_tokens)}, {policy}"
    return Figure(name, closed, "of LRU to OPT", "OPT", 1.0, reason=reason)


class Replay:
    """One ledger, and a trace that goes through it.

    What is in a block makes no difference to the ledger, so a block of the trace is a block of one token there.
    """

    def __init__(self, num_blocks: int, block_size: int, make_policy: Callable[[], EvictionPolicy]) -> None:
        self._block_size = block_size
        one_block = ExtentHeader.make(_ROOT, _ROOT, (_ROOT,), np.zeros(1, np.int32), 1, _SHAPE)
        budgets = Budgets(
            dram_bytes=num_blocks * one_block.image_bytes,
            disk_bytes=0,
            handoff_bytes=0,
            extent_max_bytes=one_block.payload_bytes,
            max_extents_per_grant=1 << 30,
        )
        self.ledger = Ledger(budgets, lambda _: None, make_policy)

    def run(self, requests: Sequence[TraceRequest], progress: Callable[[str], None] = lambda _: None) -> float:
        """Share of all prompt tokens that were found."""
        said = time.perf_counter()
        hit_tokens = 0
        for number, request in enumerate(requests):
            hit_tokens += request.hit_tokens(self._serve(request, now=float(number)), self._block_size)
            if time.perf_counter() - said > _SAY_EVERY_S:
                said = time.perf_counter()
                progress(f"  {number / len(requests):.0%}")
        return share(hit_tokens, requests)

    def _serve(self, request: TraceRequest, now: float) -> int:
        """Look a prompt up and store what is missing; the number of blocks found."""
        hashes = tuple(BlockHash(block_id.to_bytes(HASH_BYTES, "big")) for block_id in request.block_ids)
        token_ids = np.array(request.block_ids, np.int32)
        found = self.ledger.prepare_load(LoadQuery(_ROOT, hashes, token_ids, 1, 0, "bench"), now)
        self.ledger.complete_load("bench")
        offer = StoreOffer(_ROOT, hashes, token_ids, 1, _SHAPE, 0, with_tail=False)
        for header in self.ledger.prepare_store(offer, now).granted:
            self.ledger.complete_store(header.extent_id, now)
        return sum(run.num_tokens for run in found)
