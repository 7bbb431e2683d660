"""What prefill and decode replicas have in common: an engine, opened from plain options in the replica's process."""

import queue
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray import serve
from transformers import AutoTokenizer

from cache.actor import connect
from cache.client import WarehouseClient
from cache.encryption import open_vault
from cache.fingerprint import Fingerprint
from cache.hashing import as_token_ids, chain_hashes
from serving.engine.cores import Cores, shared_cores
from serving.engine.engine import Engine, EngineConfig, EngineStopped
from serving.engine.linear import Weights
from serving.engine.runner import ModelRunner, numerics_of
from serving.engine.sequence import EngineRequest, Listener
from serving.protocol import SamplingParams, TokenBatch

WARM_UP_TIMEOUT_S = 600.0

Handle = Any
"""A deployment handle. Ray's own annotations deny that its streams can be iterated."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to open an engine on whatever node the replica lands on."""

    role: Literal["prefill", "decode"]
    model_name: str
    model_dir: Path
    weights_digest: str
    dtype: str
    kv_dtype: str
    device: str
    max_model_len: int | None
    pool_bytes: int
    block_size: int
    step_tokens: int
    max_running: int
    num_threads: int
    takes_idle_cores: bool
    """Whether the engine uses more threads while other engines of its node rest."""
    remote_threshold_tokens: int
    weights: Weights = "float32"
    """How the engine keeps the model's weights."""
    chain_weights: Weights = "float32"
    """How whoever computes prompts keeps them: KV of these numerics, and no other, is stored."""
    encryption_key_file: Path | None = None
    """Of the node's disk tier: each replica reads the key for itself."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the gateway must know of the model that a replica has loaded."""

    name: str
    fingerprint: Fingerprint
    max_request_tokens: int
    kv_bytes_per_token: int
    """Of the KV as it is stored: what a load has to move."""


class ModelChanged(RuntimeError):
    """The request was made for another model than this replica serves: its KV would be wrong here."""


class Replica:
    """An engine with its place in the cluster. `close` once at the end."""

    def __init__(self, options: EngineOptions) -> None:
        context = ray.get_runtime_context()
        self.node_id: str = context.get_node_id()
        self.replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._vault = open_vault(options.encryption_key_file)
        device = resolve_device(options.device)
        dtype = resolve_dtype(options.dtype, device)
        runner = ModelRunner(options.model_dir, dtype, device, options.weights)
        chain_numerics = numerics_of(dtype, options.chain_weights)
        layout = runner.layout(options.block_size)
        kv_dtype = None if options.kv_dtype == "auto" else options.kv_dtype
        config = EngineConfig(
            role=options.role,
            replica_id=self.replica_id,
            num_blocks=max(1, options.pool_bytes // layout.block_bytes),
            block_size=options.block_size,
            step_tokens=options.step_tokens,
            max_running=options.max_running,
            num_threads=options.num_threads,
            remote_threshold_tokens=options.remote_threshold_tokens,
            kv_dtype=kv_dtype,
            is_off_chain=runner.numerics != chain_numerics,
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
        self.engine = Engine(runner, config, tokenizer, self._connect, self._cores(options, device))
        limit = self.engine.max_request_tokens
        self.info = ModelInfo(
            options.model_name,
            runner.fingerprint(options.weights_digest, options.block_size, kv_dtype=kv_dtype, numerics=chain_numerics),
            min(limit, options.max_model_len or limit),
            layout.stored_shape(kv_dtype).bytes_per_token,
        )
        self.engine.start()
        warm_up(self.engine)

    def _cores(self, options: EngineOptions, device: str) -> Cores:
        if not options.takes_idle_cores or not device.startswith("cpu"):
            return Cores(options.num_threads)
        return shared_cores(options.num_threads, self.node_id, self.replica_id)

    def _connect(self, node_id: str | None) -> WarehouseClient:
        is_local = node_id in (None, self.node_id)
        return connect(node_id or self.node_id, is_local=is_local, vault=self._vault)

    def check_model(self, fingerprint: Fingerprint) -> None:
        """Raise ModelChanged if a request's hashes belong to another model's KV than this engine's."""
        if replace(fingerprint, tenant_salt="") != self.info.fingerprint:
            raise ModelChanged(f"this replica serves {self.info.name} with other weights or settings")

    def close(self) -> None:
        self.engine.stop()


def warm_up(engine: Engine) -> None:
    """Compute a chunk and a decode step, so that the first request does not pay for reading the weights in.

    Done again, they give the engine a first measure of its speed, which the router reckons with: a replica that seemed
    slow as its memory was new would get no requests by which to show that it is not. The counters keep nothing of it.
    """
    _compute_a_little(engine)
    engine.reset_speed()
    _compute_a_little(engine)
    engine.reset_counters()


def _compute_a_little(engine: Engine) -> None:
    num_tokens = max(1, min(engine.config.step_tokens, engine.max_request_tokens - 2))
    token_ids = as_token_ids(range(num_tokens)) % 2
    root = Fingerprint("warm-up", "", "", "", engine.config.block_size).root_hash()
    last: queue.Queue[TokenBatch] = queue.Queue()

    def on_batch(batch: TokenBatch) -> None:
        if batch.finish_reason is not None:
            last.put(batch)

    engine.submit(
        EngineRequest(
            "warm-up",
            token_ids,
            root,
            tuple(chain_hashes(root, token_ids, engine.config.block_size)),
            SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
            use_cache=False,
        ),
        Listener(on_batch),
    )
    try:
        batch = last.get(timeout=WARM_UP_TIMEOUT_S)
    except queue.Empty:
        raise EngineStopped(f"the engine computed nothing in {WARM_UP_TIMEOUT_S:.0f} s") from None
    if batch.finish_reason != "length":
        raise EngineStopped(batch.text)


def resolve_device(device: str) -> str:
    """`auto` is the first CUDA device where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is float32 on a CPU, whose bfloat16 products are slower, and bfloat16 elsewhere."""
    if dtype != "auto":
        return dtype
    return "float32" if device.startswith("cpu") else "bfloat16"
