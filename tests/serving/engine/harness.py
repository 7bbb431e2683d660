"""Runs requests through a real engine from a test's thread."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from cache.client import WarehouseClient
from cache.fingerprint import Fingerprint
from cache.hashing import BlockHash, as_token_ids, chain_hashes
from cache.ledger import Budgets
from cache.node_store import NodeStore, NodeStoreConfig
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from serving.engine.engine import Engine, EngineConfig
from serving.engine.runner import ModelRunner
from serving.engine.sequence import EngineRequest, Listener
from serving.protocol import SamplingParams, TokenBatch, Usage

ROOT = Fingerprint("weights", "config", "float32", "float32", 16).root_hash()
BLOCK_SIZE = 16
TIMEOUT_S = 60.0


@dataclass
class Answer:
    """A finished request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    usage: Usage | None = None

    @property
    def cost(self) -> Usage:
        assert self.usage is not None
        return self.usage


class Pending:
    """A request under way: collects batches until the last one."""

    def __init__(self) -> None:
        self.batches: queue.Queue[TokenBatch] = queue.Queue()

    def first(self) -> TokenBatch:
        return self.batches.get(timeout=TIMEOUT_S)

    def wait(self) -> Answer:
        answer = Answer()
        while not answer.finish_reason:
            batch = self.batches.get(timeout=TIMEOUT_S)
            answer.token_ids += batch.token_ids
            answer.text += batch.text
            answer.finish_reason = batch.finish_reason or ""
            answer.usage = batch.usage
        return answer


class EngineUnderTest:
    """A real engine over a real model folder."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._count = 0

    def submit(
        self,
        token_ids: list[int] | np.ndarray[tuple[int], np.dtype[np.int32]],
        sampling: SamplingParams,
        *,
        root: BlockHash = ROOT,
        use_cache: bool = True,
        listener: Listener | None = None,
        request_id: str | None = None,
    ) -> Pending:
        self._count += 1
        pending = Pending()
        ids = as_token_ids(token_ids)
        block_size = self.engine.config.block_size
        request = EngineRequest(
            request_id or f"{self.engine.config.replica_id}-{self._count}",
            ids,
            root,
            tuple(chain_hashes(root, ids, block_size)),
            sampling,
            use_cache=use_cache,
        )
        self.engine.submit(request, listener or Listener(on_batch=pending.batches.put))
        return pending

    def greedy(self, token_ids: list[int], max_tokens: int, *, use_cache: bool = True) -> Answer:
        return self.submit(token_ids, SamplingParams(max_tokens, temperature=0.0), use_cache=use_cache).wait()


def make_engine(
    model_dir: Path,
    store: NodeStore | None = None,
    *,
    replica_id: str = "engine",
    num_blocks: int = 64,
    step_tokens: int = 64,
    max_running: int = 8,
    block_size: int = BLOCK_SIZE,
) -> Engine:
    runner = ModelRunner(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = EngineConfig(
        "decode",
        replica_id,
        num_blocks,
        block_size=block_size,
        step_tokens=step_tokens,
        max_running=max_running,
        remote_threshold_tokens=32,
    )
    connect = (lambda node_id: WarehouseClient(store)) if store is not None else None
    return Engine(runner, config, tokenizer, connect)


@contextmanager
def running(engine: Engine) -> Iterator[EngineUnderTest]:
    """Start the engine, check its books at the end, stop it."""
    engine.start()
    try:
        yield EngineUnderTest(engine)
        engine.check_integrity()
    finally:
        engine.stop()


def open_store(directory: Path | None, *, dram_bytes: int = 64 << 20, disk_bytes: int = 256 << 20) -> NodeStore:
    """A node store in this process, with plain memory as its dram tier."""
    disk = FileTier(directory) if directory is not None else None
    budgets = Budgets(dram_bytes, disk_bytes if disk else 0, 64 << 20)
    return NodeStore(NodeStoreConfig(budgets, min_free_bytes=0), MemoryTier(), disk)
