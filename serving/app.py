"""Puts the deployments together, gateway -> decode -> prefill, and brings them up on a Ray that is connected."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cache.actor import NodeStoreOptions, find_node_store, start_node_store, stop_node_store
from cache.disk_worker import DiskConfig
from cache.messages import StoreStats
from cache.node_store import NodeStoreConfig
from cache.occupancy import Budgets as StoreBudgets
from router.policy import PolicyConfig
from serving.config import OBJECT_STORE_FILL, Budgets, Config, DecodeConfig, PrefillConfig, warehouse_directory
from serving.decode import DecodeReplica
from serving.errors import LaunchError
from serving.gateway import Gateway, GatewayOptions
from serving.handoff import HandoffTimeouts
from serving.http_settings import HttpSettings, hash_api_key
from serving.model_files import ModelFiles
from serving.prefill import PrefillReplica
from serving.replica import EngineOptions

APP_NAME = "tokenloft"
MAX_PREFILL_REQUESTS = 256
SPARE_GATEWAY_REQUESTS = 256
"""What the gateway takes beyond `http.max_requests`: health, metrics, and those that it refuses itself."""
STOP_TIMEOUT_S = 20.0

_TARGET_ROUTER: Any = "router.serve_adapter.TargetRouter"
"""By name: a class would be pickled into Ray's controller."""

_LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the application is made from."""

    config: Config
    budgets: Budgets
    model: ModelFiles
    node_ids: tuple[str, ...]


def build_application(plan: Plan) -> Any:
    """The Serve application of `plan`."""
    config = plan.config
    prefill = None
    if config.prefill.replicas:
        prefill = _deployment(PrefillReplica, "prefill", config.prefill, MAX_PREFILL_REQUESTS).bind(
            engine_options(plan, "prefill")
        )
    timeouts = HandoffTimeouts(config.prefill.accept_timeout_s, config.prefill.progress_timeout_s)
    decode = _deployment(DecodeReplica, "decode", config.decode, config.decode.max_ongoing_requests).bind(
        engine_options(plan, "decode"), timeouts, prefill
    )
    gateway: Any = serve.deployment(
        Gateway,
        name="gateway",
        max_ongoing_requests=config.http.max_requests + SPARE_GATEWAY_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        logging_config=_LOGGING,
    )
    return gateway.bind(gateway_options(plan), decode, prefill)


def _deployment(replica_class: type, name: str, config: PrefillConfig | DecodeConfig, max_ongoing_requests: int) -> Any:
    return serve.deployment(
        replica_class,
        name=name,
        num_replicas=config.replicas,
        max_ongoing_requests=max_ongoing_requests,
        # Engines set their own threads; Ray's CPU resource would only keep replicas from being placed.
        ray_actor_options={"num_cpus": 0, "num_gpus": config.gpus},
        request_router_config=RequestRouterConfig(request_router_class=_TARGET_ROUTER),
        graceful_shutdown_timeout_s=STOP_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,
        logging_config=_LOGGING,
    )


def engine_options(plan: Plan, role: Literal["prefill", "decode"]) -> EngineOptions:
    """Options of the engines of one role."""
    config, budgets = plan.config, plan.budgets
    is_prefill = role == "prefill"
    return EngineOptions(
        role=role,
        model_name=plan.model.name,
        model_dir=plan.model.directory,
        weights_digest=plan.model.weights_digest,
        dtype=config.model.dtype,
        kv_dtype=config.cache.kv_dtype,
        device=config.model.device,
        max_model_len=config.model.max_model_len,
        pool_bytes=budgets.prefill_pool_bytes if is_prefill else budgets.decode_pool_bytes,
        block_size=config.cache.block_size,
        step_tokens=config.prefill.chunk_tokens if is_prefill else config.decode.chunk_tokens,
        max_running=config.decode.max_running,
        num_threads=budgets.prefill_threads if is_prefill else budgets.decode_threads,
        takes_idle_cores=(config.prefill if is_prefill else config.decode).threads is None,
        remote_threshold_tokens=remote_threshold_tokens(config),
        weights="float32" if is_prefill else config.decode.weights,
        chain_weights="float32" if config.prefill.replicas else config.decode.weights,
        encryption_key_file=config.cache.encryption_key_file,
    )


def remote_threshold_tokens(config: Config) -> int:
    """Uncached prompt tokens from which a prefill replica is asked.

    Decode with smaller weights leaves every block to it: what decode computes itself is not kept.
    """
    threshold = config.prefill.remote_threshold_tokens
    return threshold if config.decode.weights == "float32" else min(threshold, config.cache.block_size)


def gateway_options(plan: Plan) -> GatewayOptions:
    """Options of the gateway."""
    config = plan.config
    return GatewayOptions(
        model_name=plan.model.name,
        model_dir=plan.model.directory,
        cache_enabled=config.cache.enabled,
        http=HttpSettings(
            max_body_bytes=config.http.max_body_bytes,
            max_requests=config.http.max_requests,
            api_key_hashes=frozenset(hash_api_key(key) for key in config.http.api_keys),
        ),
        policy=PolicyConfig(
            remote_threshold_tokens=remote_threshold_tokens(config),
            overload_factor=config.router.overload_factor,
        ),
        prediction_ttl_s=config.router.prediction_ttl_s,
        node_ids=plan.node_ids,
        share_cache_between_keys=config.http.share_cache_between_keys,
    )


def node_store_options(config: Config, budgets: Budgets) -> NodeStoreOptions:
    """Options of every node's store."""
    cache = config.cache
    directory = warehouse_directory(config) if budgets.disk_bytes else None
    return NodeStoreOptions(
        NodeStoreConfig(
            StoreBudgets(
                budgets.dram_bytes,
                budgets.disk_bytes,
                budgets.handoff_bytes,
                cache.extent_max_bytes,
                dirty_bytes=budgets.dram_bytes // 2 if cache.dirty_bytes is None else cache.dirty_bytes,
            ),
            DiskConfig(cache.min_free_bytes, cache.fsync_interval_s if cache.fsync == "batched" else 0.0),
            lease_ttl_s=cache.lease_ttl_s,
            scrub_bytes_per_s=cache.scrub_bytes_per_s,
            eviction=cache.eviction,
        ),
        directory,
        fsync=cache.fsync != "never",
        encryption_key_file=cache.encryption_key_file,
    )


def fit_object_store(budgets: Budgets, object_store_bytes: float) -> Budgets:
    """The budgets with a dram tier that fits the object store of a node, which a Ray that was joined has sized."""
    room = int(object_store_bytes * OBJECT_STORE_FILL) - budgets.handoff_bytes
    return replace(budgets, dram_bytes=max(0, min(budgets.dram_bytes, room)))


@contextmanager
def node_stores(config: Config, budgets: Budgets) -> Iterator[dict[str, StoreStats]]:
    """Node stores on all nodes that are alive, by node id; written out and ended when the block ends.

    They belong to this process, so that they end with it however it ends. Raises FolderError if a folder can't be
    used, LaunchError if another server runs on this Ray: its node stores are not ours to share or to end.
    """
    handles: list[Any] = []
    everyone: Any = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in everyone if node["Alive"]]
    if any(find_node_store(node["NodeID"]) is not None for node in nodes):
        raise LaunchError("another tokenloft serves on this Ray already: stop it, or give this one a Ray of its own")
    try:
        for node in nodes:
            fitted = fit_object_store(budgets, node["Resources"].get("object_store_memory", 0.0))
            handles.append(start_node_store(node["NodeID"], node_store_options(config, fitted)))
        stats = [ray.get(handle.stats.remote()) for handle in handles]
        yield {each.node_id: each for each in stats}
    finally:
        for handle in handles:
            stop_node_store(handle)


@contextmanager
def running(plan: Plan, *, is_private: bool) -> Iterator[None]:
    """The application, up and answering while the block runs. On a Ray of its own Serve goes with it."""
    http = plan.config.http
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": http.host, "port": http.port, "request_timeout_s": None},
        logging_config=_LOGGING,
    )
    _check_address(plan)
    try:
        _deploy(plan)
        yield
    finally:
        with _silence():
            # At once, before anything waits: who stops a Ray job gives it three seconds.
            serve.delete(APP_NAME, _blocking=False)
            if is_private:
                serve.shutdown()  # type: ignore[no-untyped-call]


def _check_address(plan: Plan) -> None:
    """On a Ray where Serve runs already, it listens where it listens, whatever it was asked."""
    client: Any = serve.context._get_global_client()
    actual = client.http_config
    http = plan.config.http
    if (actual.host, actual.port) != (http.host, http.port):
        raise LaunchError(
            f"Serve runs on this Ray already and listens on {actual.host} port {actual.port}, not on {http.host} port "
            f"{http.port}: give it that address with --host and --port, or end it with `serve shutdown`"
        )


def _deploy(plan: Plan) -> None:
    try:
        serve.run(build_application(plan), name=APP_NAME, route_prefix="/", logging_config=_LOGGING)
    except RuntimeError as error:
        raise LaunchError(f"the engines did not come up: {_cause_of_failure() or error}") from error


def _cause_of_failure() -> str | None:
    """The last line of the first failed deployment's traceback, which names the exception."""
    status = serve.status().applications.get(APP_NAME)
    for deployment in status.deployments.values() if status else ():
        lines = [line for line in deployment.message.splitlines() if line.strip()]
        if "Traceback" in deployment.message:
            return lines[-1].strip()
    return None


@contextmanager
def _silence() -> Iterator[None]:
    """Ray reports its own controller's end as a failure; whoever pressed ctrl-C should not have to wonder."""
    with Path(os.devnull).open("w") as null, redirect_stdout(null), redirect_stderr(null):
        yield
