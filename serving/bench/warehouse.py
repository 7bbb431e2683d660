"""`tokenloft bench warehouse`: what storing and loading KV costs, beside what the machine allows.

Bytes (`warehouse_io`, `warehouse_encryption`), index (`warehouse_index`), the committing engine's share, and storage
dtypes: each through the code that the server runs.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.client import WarehouseClient
from cache.disk_worker import DiskConfig
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.memory import MemoryTier
from serving.bench.report import Figure, Report
from serving.bench.storage_dtypes import measure_storage_dtypes
from serving.bench.warehouse_encryption import measure_encryption
from serving.bench.warehouse_index import IndexFigures, measure_index
from serving.bench.warehouse_io import (
    BLOCK_SIZE,
    ROOT,
    SHAPE,
    Prompt,
    measure_commit,
    measure_disk_loads,
    measure_dram_load,
)
from serving.config import load_config
from serving.engine.block_pool import BlockPool
from serving.engine.loader import Loader
from serving.engine.measure import Speed
from serving.engine.planner import Planner
from serving.engine.runner import set_num_threads
from serving.engine.sequence import EngineRequest, Listener, Sequence, Status
from serving.engine.transfers import Transfers
from serving.machine import measure_for
from serving.ray_session import prepare_environment, ray_session

_MAX_LOOKUP_S = 200e-6
_MAX_OPEN_S = 2.0
_MAX_BYTES_PER_BLOCK = 400
_MAX_STORE_S = 2e-3


@dataclass(frozen=True, slots=True)
class WarehouseBenchOptions:
    """What to measure and how long."""

    folder: Path | None
    """On the disk to be measured; None: the system's folder for temporary files."""
    model_dir: Path | None
    """Whose logits show what storage dtypes do; None: leave that out."""
    num_tokens: int = 4096
    rounds: int = 7
    index_blocks: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    with_ray: bool = True

    @classmethod
    def of(cls, folder: Path | None, model_dir: Path | None, *, is_quick: bool) -> "WarehouseBenchOptions":
        """The full bench takes about three minutes, the quick one half a minute and 100,000 blocks."""
        if is_quick:
            return cls(folder, None, 1024, 3, (10_000, 100_000))
        return cls(folder, model_dir)


def run_warehouse_bench(
    options: WarehouseBenchOptions, progress: Callable[[str], None], plot_to: Path | None = None
) -> Report:
    """Measure everything in a folder of its own, which is removed afterwards. Raises OSError if it can't be used."""
    started = time.perf_counter()
    set_num_threads(1)
    report = Report("warehouse")
    with tempfile.TemporaryDirectory(prefix="tokenloft-bench-", dir=options.folder) as name:
        folder = Path(name)
        prompt = Prompt.of(options.num_tokens)
        progress("commits to durable")
        report.figures += measure_commit(folder, prompt, options.rounds)
        progress("loads from disk and page cache")
        report.figures += measure_disk_loads(folder, prompt, options.rounds)
        progress("the same with encryption")
        report.figures += measure_encryption(folder, prompt, options.rounds)
        if options.with_ray:
            progress("loads from the dram tier of another process")
            with dram_of_another_process(prompt) as client:
                report.figures.append(measure_dram_load(client, prompt, options.rounds))
        progress("what a commit costs the step loop")
        report.figures.append(_store_cost(prompt, options.rounds))
        growth: list[IndexFigures] = []
        for num_blocks in options.index_blocks:
            progress(f"an index of {num_blocks:,} blocks")
            growth.append(measure_index(num_blocks, folder / f"index-{num_blocks}"))
        report.figures += _index_figures(growth)
    if options.model_dir is not None:
        progress("storage dtypes")
        report.figures += measure_storage_dtypes(options.model_dir, progress)
    report.seconds = time.perf_counter() - started
    if plot_to is not None:
        plot_growth(growth, plot_to / "warehouse-growth.png")
    return report


@contextmanager
def dram_of_another_process(prompt: Prompt) -> Iterator[WarehouseClient]:
    """A node store as the server has it, in a Ray of its own."""
    prepare_environment()
    import ray

    from cache.actor import NodeStoreOptions, connect, start_node_store, stop_node_store

    room = 3 * prompt.kv_bytes
    config = load_config(None, [f"cache.dram_bytes={room}", "cache.handoff_bytes=0", "cache.disk_bytes=0"])
    with ray_session(config, measure_for(config)):
        node_id = ray.get_runtime_context().get_node_id()
        handle: Any = start_node_store(node_id, NodeStoreOptions(NodeStoreConfig(Budgets(room, 0, 0)), None))
        try:
            yield connect(node_id, is_local=True)
        finally:
            stop_node_store(handle)


def _store_cost(prompt: Prompt, rounds: int) -> Figure:
    """Seconds of the step loop that the commit of a whole prompt takes; the loader's thread does the rest."""
    with NodeStore(NodeStoreConfig(Budgets(3 * prompt.kv_bytes, 0, 0), DiskConfig()), MemoryTier(), None) as store:
        loader = Loader(lambda node_id: WarehouseClient(store), prompt.pool)
        seconds = [_commit_once(prompt, loader, number) for number in range(max(rounds, 5))]
        loader.close()
    return Figure(
        f"step loop's time for a commit of {len(prompt.token_ids):,} tokens",
        statistics.median(seconds) * 1e3,
        "ms",
        against="limit",
        against_value=_MAX_STORE_S * 1e3,
        target=1.0,
        lower_is_better=True,
    )


def _commit_once(prompt: Prompt, loader: Loader, number: int) -> float:
    posted: list[Callable[[], None]] = []
    pool = BlockPool(prompt.num_blocks, BLOCK_SIZE)
    planner = Planner("auto", SHAPE.bytes_per_token, BLOCK_SIZE, Speed(), loader)
    transfers = Transfers(loader, planner, pool, SHAPE, Counter(), posted.append, lambda sequence: None, 256)
    request = EngineRequest(f"bench-{number}", prompt.token_ids, ROOT, prompt.block_hashes, None)
    sequence = Sequence(request, Listener(), BLOCK_SIZE, 0.0)
    sequence.block_table = pool.allocate(prompt.num_blocks) or []
    sequence.num_computed = len(prompt.token_ids)
    sequence.status = Status.FINISHED
    started = time.perf_counter()
    transfers.commit(sequence)
    seconds = time.perf_counter() - started
    while not posted:
        time.sleep(0.001)
    started = time.perf_counter()
    for action in posted:
        action()
    return seconds + time.perf_counter() - started


def _index_figures(growth: list[IndexFigures]) -> list[Figure]:
    figures: list[Figure] = []
    for each in growth:
        of = f"of {each.num_blocks:,} blocks"
        figures += [
            _limit(f"lookup of 256 blocks, p99, index {of}", each.lookup_p99_s * 1e6, "us", _MAX_LOOKUP_S * 1e6),
            Figure(f"lookup of 256 blocks, p50, index {of}", each.lookup_p50_s * 1e6, "us"),
            Figure(f"bookkeeping of a store of 4 blocks, index {of}", each.reserve_s * 1e6, "us"),
            _limit(f"open an index {of}", each.open_s, "s", _MAX_OPEN_S),
            _limit(f"memory of an index {of}", each.bytes_per_block, "bytes/block", _MAX_BYTES_PER_BLOCK),
        ]
    return figures


def _limit(name: str, value: float, unit: str, limit: float) -> Figure:
    return Figure(name, value, unit, against="limit", against_value=limit, target=1.0, lower_is_better=True)


def plot_growth(growth: list[IndexFigures], path: Path) -> None:
    """Three small charts over the number of blocks, as a PNG. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    sizes = [each.num_blocks for each in growth]
    charts: tuple[tuple[str, list[float]], ...] = (
        ("lookup of 256 blocks, p99, microseconds", [each.lookup_p99_s * 1e6 for each in growth]),
        ("open, seconds", [each.open_s for each in growth]),
        ("bytes of memory a block", [each.bytes_per_block for each in growth]),
    )
    figure, axes = plt.subplots(1, len(charts), figsize=(12, 3.5), layout="constrained")
    for axis, (title, values) in zip(axes, charts, strict=True):
        axis.plot(sizes, values, "o-")
        axis.set(xscale="log", xlabel="blocks", title=title, ylim=(0, max(values) * 1.2))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
