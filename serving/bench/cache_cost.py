"""What the cache costs where it never helps: CPU seconds of the same work with it and without it.

Every prompt is new. With the cache on, an engine looks each up in vain, hashes, copies, seals and hands its KV to a
node store, which keeps it in dram and makes it durable on disk; with it off, the same engine is told to leave it all
out. Engine and store are one process here, so the process's CPU time, all threads and the kernel's work for them
included, is that of everything the cache does.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cache.client import WarehouseClient
from cache.disk_worker import DiskConfig
from cache.hashing import BlockHash
from cache.messages import PurgeQuery
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from serving.bench.report import Figure, interleaved
from serving.bench.turns import ask, random_tokens
from serving.engine.detokenizer import Tokenizer
from serving.engine.engine import Engine, EngineConfig
from serving.engine.runner import ModelRunner

ROOT = BlockHash(b"tokenloft no use")


@dataclass(frozen=True, slots=True)
class CacheCostOptions:
    """What to measure and how long."""

    num_threads: int
    num_prompts: int = 4
    prompt_tokens: int = 1024
    decode_tokens: int = 64
    rounds: int = 5
    chunk_tokens: int = 256
    block_size: int = 32
    folder: Path | None = None
    """On the disk to write to; None: where temporary files go."""

    @property
    def num_tokens(self) -> int:
        """Of all prompts and answers of a round."""
        return self.num_prompts * (self.prompt_tokens + self.decode_tokens)


def measure_cache_cost(runner: ModelRunner, tokenizer: Tokenizer, options: CacheCostOptions) -> list[Figure]:
    """CPU seconds of one round with the cache and without it, in turn. Raises OSError if the store kept nothing."""
    with _open(runner, tokenizer, options) as (engine, store):
        run = partial(_round, engine, store, runner.vocab_size, options)
        for root in (ROOT, None):  # memory that is touched for the first time costs more
            run(root)
        seconds = interleaved({"on": partial(run, ROOT), "off": partial(run, None)}, options.rounds)
        if engine.counters["committed_turns"] < options.num_prompts * options.rounds:
            raise OSError(f"the warehouse did not take the turns: {store.stats()}")
    name = f"CPU of {options.num_prompts} new prompts of {options.prompt_tokens}, cache on"
    return [Figure(name, seconds["on"], "s", "cache off", seconds["off"], 1.03, lower_is_better=True)]


def _round(
    engine: Engine, store: NodeStore, vocab_size: int, options: CacheCostOptions, root_hash: BlockHash | None
) -> float:
    """CPU seconds until all answers are there, and stored durably if they are."""
    prompts = [random_tokens(options.prompt_tokens, vocab_size) for _ in range(options.num_prompts)]
    started = time.process_time()
    ask(engine, prompts, options.decode_tokens, root_hash)
    engine.purge(PurgeQuery(root_hash=ROOT)).result()  # comes after the last store of a turn
    store.flush()
    return time.process_time() - started


@contextmanager
def _open(runner: ModelRunner, tokenizer: Tokenizer, options: CacheCostOptions) -> Iterator[tuple[Engine, NodeStore]]:
    """Room for two rounds: from the third on, evictions are a part of the cost."""
    bytes_per_token = runner.layout(options.block_size).bytes_per_token
    room = 2 * options.num_tokens * bytes_per_token
    config = EngineConfig(
        "decode",
        "cost",
        num_blocks=2 * options.num_tokens // options.block_size,
        block_size=options.block_size,
        step_tokens=options.chunk_tokens,
        num_threads=options.num_threads,
    )
    with tempfile.TemporaryDirectory(prefix="tokenloft-bench-", dir=options.folder) as folder:
        store_config = NodeStoreConfig(Budgets(room, room, 0), DiskConfig(min_free_bytes=0))
        with (
            NodeStore(store_config, MemoryTier(), FileTier(Path(folder) / "warehouse")) as store,
            Engine(runner, config, tokenizer, lambda node_id: WarehouseClient(store)) as engine,
        ):
            yield engine, store
