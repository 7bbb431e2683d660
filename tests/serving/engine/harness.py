"""Runs requests through a real engine from a test's thread."""

import queue
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from cache.client import WarehouseClient
from cache.disk_worker import DiskConfig
from cache.extent import NOBODY, Origin
from cache.fingerprint import Fingerprint
from cache.hashing import BlockHash, as_token_ids, chain_hashes
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from serving.engine.engine import Engine, EngineConfig
from serving.engine.linear import Weights
from serving.engine.runner import ModelRunner
from serving.engine.sequence import EngineRequest, Listener, Sequence
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


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    rng = random.Random(seed)
    return [rng.randrange(3, 300) for _ in range(num_tokens)]


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
        num_choices: int = 1,
        generated: tuple[int, ...] = (),
        origin: Origin = NOBODY,
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
            num_choices=num_choices,
            generated=generated,
            origin=origin,
        )
        self.engine.submit(request, listener or Listener(on_batch=pending.batches.put))
        return pending

    def greedy(self, token_ids: list[int], max_tokens: int, *, use_cache: bool = True) -> Answer:
        return self.submit(token_ids, SamplingParams(max_tokens, temperature=0.0), use_cache=use_cache).wait()


@dataclass
class Handoff:
    """Requests decoded by `decode`, their long rests prefilled by `prefill`, as the deployments do it."""

    prefill: EngineUnderTest
    decode: EngineUnderTest
    announced: list[tuple[int, bool]] = field(default_factory=list)
    """Tokens and last word of each announcement so far."""
    on_announced: Callable[[], None] = lambda: None
    sends_logits: bool = True
    """Whether the first token is sampled from the prefill engine's logits, or its KV computed by `decode`."""

    def submit(
        self,
        token_ids: list[int],
        sampling: SamplingParams,
        request_id: str,
        *,
        root: BlockHash = ROOT,
        use_cache: bool = True,
        origin: Origin = NOBODY,
    ) -> Pending:
        pending = Pending()

        def ask(sequence: Sequence) -> bool:
            self._ask(sequence, use_cache=use_cache)
            return True

        self.decode.submit(
            token_ids,
            sampling,
            root=root,
            use_cache=use_cache,
            listener=Listener(on_batch=pending.batches.put, ask_prefill=ask),
            request_id=request_id,
            origin=origin,
        )
        return pending

    def _ask(self, sequence: Sequence, *, use_cache: bool) -> None:
        request_id, block_size = sequence.request_id, sequence.block_size
        num_tokens = sequence.num_prompt_tokens - (0 if self.sends_logits else 1)

        def on_progress(num_tokens: int, num_computed: int, is_done: bool) -> None:
            self.announced.append((num_tokens, is_done))
            self.on_announced()
            self.decode.engine.handoff_progress(request_id, num_tokens, None)
            if is_done:
                self.decode.engine.handoff_closed(request_id)

        request = EngineRequest(
            request_id,
            sequence.token_ids[:num_tokens].copy(),
            sequence.request.root_hash,
            tuple(sequence.block_hashes[: num_tokens // block_size]),
            None,
            use_cache=use_cache,
            handoff_owner=request_id,
            handoff_first_block=sequence.num_computed // block_size,
            wants_logits=self.sends_logits,
            origin=sequence.request.origin,
        )
        self.prefill.engine.submit(
            request,
            Listener(
                on_progress=on_progress,
                on_logits=lambda logits: self.decode.engine.handoff_logits(request_id, logits),
            ),
        )


def make_engine(
    model_dir: Path,
    store: NodeStore | None = None,
    *,
    replica_id: str = "engine",
    num_blocks: int = 64,
    step_tokens: int = 64,
    max_running: int = 8,
    block_size: int = BLOCK_SIZE,
    kv_dtype: str | None = None,
    weights: Weights = "float32",
    is_off_chain: bool = False,
) -> Engine:
    runner = ModelRunner(model_dir, weights=weights)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    config = EngineConfig(
        "decode",
        replica_id,
        num_blocks,
        block_size=block_size,
        step_tokens=step_tokens,
        max_running=max_running,
        remote_threshold_tokens=32,
        kv_dtype=kv_dtype,
        is_off_chain=is_off_chain,
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
    return NodeStore(NodeStoreConfig(budgets, DiskConfig(min_free_bytes=0)), MemoryTier(), disk)
