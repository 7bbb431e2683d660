"""How long a returning turn takes to its first token, beside what reading its bytes and computing what is new cost.

An engine over a node store that holds a prefix: once in dram, once on disk alone, whose files are read cold. The turn
is the prefix with new tokens behind it. Its pool is emptied before, so that everything stored has to come; right
after, with the prefix in the pool, another turn of the same length says what the new tokens cost. Copying as many
bytes, or reading the same files with nothing done to them, runs in turn with both.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.client import WarehouseClient
from cache.disk_worker import DiskConfig
from cache.events import Tier
from cache.hashing import BlockHash, chain_hashes
from cache.messages import LoadQuery, PurgeQuery
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from serving.bench.report import Figure, interleaved
from serving.bench.turns import ask, random_tokens
from serving.bench.warehouse_io import drop_page_cache, read_plainly
from serving.engine.detokenizer import Tokenizer
from serving.engine.engine import Engine, EngineConfig
from serving.engine.runner import ModelRunner
from serving.protocol import Usage

ROOT = BlockHash(b"tokenloft warm..")
_TARGETS = {Tier.DRAM: 1.15, Tier.DISK: 1.2}
_LIMITS = {Tier.DRAM: "memcpy", Tier.DISK: "plain read"}


@dataclass(frozen=True, slots=True)
class WarmTurnOptions:
    """What to measure and how long."""

    num_threads: int
    prefix_tokens: int = 4096
    new_tokens: int = 32
    rounds: int = 7
    chunk_tokens: int = 256
    block_size: int = 32
    folder: Path | None = None
    """On the disk to measure; None: where temporary files go."""


def measure_warm_turns(runner: ModelRunner, tokenizer: Tokenizer, options: WarmTurnOptions) -> list[Figure]:
    """Times to first token of a turn from dram and from cold disk. Raises OSError if the store takes nothing."""
    with tempfile.TemporaryDirectory(prefix="tokenloft-bench-", dir=options.folder) as folder:
        bench = WarmTurnBench(runner, tokenizer, options, Path(folder))
        return [*bench.measure(Tier.DRAM), *bench.measure(Tier.DISK)]


class WarmTurnBench:
    """Opens one store and one engine for each tier. From dram comes first: it writes what disk reads."""

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer, options: WarmTurnOptions, folder: Path) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._options = options
        self._folder = folder
        self._prefix = random_tokens(options.prefix_tokens, runner.vocab_size, seed=0)
        self._num_bytes = options.prefix_tokens * runner.layout(options.block_size).bytes_per_token

    def measure(self, tier: Tier) -> list[Figure]:
        """Medians of all rounds, the turn beside its limit."""
        with self._open_store(tier) as store, self._open_engine(store) as engine:
            if tier is Tier.DRAM:
                ask(engine, [self._prefix], 1, ROOT)
                _forget(engine, store)
            paths = self._paths(store) if tier is Tier.DISK else []
            warm = interleaved(
                {
                    "limit": self._copy if tier is Tier.DRAM else lambda: _read(paths),
                    "turn": lambda: self._turn(engine, store, paths, tier),
                    "new tokens": lambda: self._turn(engine, store, paths, Tier.DEVICE),
                },
                self._options.rounds,
            )
        return self._figures(tier, warm["turn"], warm["limit"], warm["new tokens"])

    def _figures(self, tier: Tier, turn_s: float, limit_s: float, new_s: float) -> list[Figure]:
        name = f"warm turn, {self._options.prefix_tokens} + {self._options.new_tokens} tokens, {tier.value}"
        against = f"{_LIMITS[tier]} and new tokens"
        bound_s = limit_s + new_s
        return [
            Figure(name, turn_s * 1e3, "ms", against, bound_s * 1e3, _TARGETS[tier], lower_is_better=True),
            Figure(f"{name}: new tokens", new_s * 1e3, "ms"),
            Figure(f"{name}: {_LIMITS[tier]}", self._num_bytes / limit_s / 1e9, "GB/s"),
        ]

    # -- what runs in turn ----------------------------------------------------------------------------

    def _turn(self, engine: Engine, store: NodeStore, paths: list[Path], tier: Tier) -> float:
        """Seconds to the first token of a turn whose prefix comes from `tier`."""
        if tier is not Tier.DEVICE:
            _forget(engine, store)
            drop_page_cache(paths)
        new = random_tokens(self._options.new_tokens, self._runner.vocab_size)
        timing = ask(engine, [np.concatenate([self._prefix, new])], 1, ROOT)
        _check(timing.usages[0], tier, len(self._prefix))
        return timing.first_token_s

    def _copy(self) -> float:
        # Written before: memory that the process has never touched would cost more than the copy.
        source, target = np.ones(self._num_bytes, np.uint8), np.ones(self._num_bytes, np.uint8)
        return _seconds(lambda: np.copyto(target, source))

    def _paths(self, store: NodeStore) -> list[Path]:
        """Files that the prefix is in."""
        hashes = tuple(chain_hashes(ROOT, self._prefix, self._options.block_size))
        grant = store.prepare_load(LoadQuery(ROOT, hashes, self._prefix, self._options.block_size, 0, "bench"))
        store.complete_load("bench")
        if grant.num_tokens < len(self._prefix) or any(piece.tier is not Tier.DISK for piece in grant.pieces):
            raise OSError(f"the warehouse in {self._folder} did not take the prefix: {store.stats().state}")
        return [Path(piece.source) for piece in grant.pieces]

    # -- what it runs on ------------------------------------------------------------------------------

    def _open_store(self, tier: Tier) -> NodeStore:
        """One that keeps the prefix in both tiers, or on disk alone."""
        room = 4 * self._num_bytes
        dram_bytes = room if tier is Tier.DRAM else self._num_bytes // 64
        config = NodeStoreConfig(Budgets(dram_bytes, room, 0), DiskConfig(min_free_bytes=0))
        return NodeStore(config, MemoryTier(), FileTier(self._folder / "warehouse"))

    def _open_engine(self, store: NodeStore) -> Engine:
        options = self._options
        config = EngineConfig(
            "decode",
            "warm",
            num_blocks=(options.prefix_tokens + 8 * options.new_tokens) // options.block_size + 4,
            block_size=options.block_size,
            step_tokens=options.chunk_tokens,
            num_threads=options.num_threads,
        )
        return Engine(self._runner, config, self._tokenizer, lambda node_id: WarehouseClient(store))


def _forget(engine: Engine, store: NodeStore) -> None:
    """Empty the pool, when everything of the last turn has come to rest."""
    engine.purge(PurgeQuery(root_hash=ROOT)).result()
    store.flush()


def _check(usage: Usage, tier: Tier, num_tokens: int) -> None:
    """Raise ValueError if the prefix came from elsewhere, as no figure may tell of another path than it names."""
    came = {Tier.DEVICE: usage.device_tokens, Tier.DRAM: usage.dram_tokens, Tier.DISK: usage.disk_tokens}[tier]
    if came < num_tokens:
        raise ValueError(f"{came} of {num_tokens} tokens came from {tier.value}: {usage}")


def _read(paths: list[Path]) -> float:
    drop_page_cache(paths)
    buffer = bytearray(b"1" * max(path.stat().st_size for path in paths))
    return _seconds(lambda: read_plainly(paths, buffer))


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
