"""The node store as a named Ray actor pinned to its node, and the port through which clients call it.

A thin shell: the actor owns a `NodeStore` with the object store as dram tier and files as disk tier, the
port adds time limits and turns Ray's errors into StoreUnavailable. A killed actor is restarted by Ray,
reopens its folder and announces itself under a new epoch; its dram tier is gone.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cache.client import READ_TIMEOUT_S, WarehouseClient
from cache.encryption import Vault, open_vault
from cache.errors import FolderError, StoreUnavailable
from cache.events import DeviceBlocks, EventBatch, ReplicaLoad, Tier
from cache.extent import Image
from cache.messages import LoadGrant, LoadQuery, PurgeQuery, PurgeReceipt, StoreGrant, StoreOffer, StoreStats
from cache.node_store import NodeStore, NodeStoreConfig
from cache.tiers.disk import FileTier
from cache.tiers.folder import LOCK_WAIT_S
from cache.tiers.object_store import ObjectStoreTier, read_object

NAMESPACE = "tokenloft"
CALL_TIMEOUT_S = 15.0
"""Longer than any wait inside the node store; a call that takes more has lost its actor."""

MAX_WRITTEN_ONCE_BYTES = 1 << 30
"""Most of the object store's memory that is taken from the machine at the start; the rest is when it is used."""

PURGE_TIMEOUT_S = 60.0
"""A purge waits for the disk, and looks at every extent."""

# Lookups must not wait behind stores that wait for room, nor either behind readers of events. What a
# waiting store waits for must not queue behind it.
_GROUPS = {"read": 8, "store": 8, "commit": 8, "events": 32}


@dataclass(frozen=True, slots=True)
class NodeStoreOptions:
    """What the actor needs to open its node store."""

    config: NodeStoreConfig
    directory: Path | None
    """Folder of the disk tier; `{node}` in it is replaced by the node's id. None: no disk tier."""
    fsync: bool = True
    lock_wait_s: float = LOCK_WAIT_S
    """How long to wait for a folder that another process still holds."""
    encryption_key_file: Path | None = None
    """Encrypt the disk tier with the key in this file of the node. The key itself never goes through Ray."""


class NodeStoreActor:
    """The actor's class; see `start_node_store`."""

    def __init__(self, node_id: str, options: NodeStoreOptions) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._error: FolderError | None = None
        self._store: NodeStore | None = None
        try:
            self._store = self._open(node_id, options)
        except FolderError as error:
            # Raised later, from `wait_ready`: an exception here would only show as a dead actor.
            self._error = error

    def _open(self, node_id: str, options: NodeStoreOptions) -> NodeStore:
        disk = None
        if options.directory is not None:
            directory = Path(str(options.directory).replace("{node}", node_id))
            report = logging.getLogger("tokenloft.warehouse").info
            vault = open_vault(options.encryption_key_file)
            disk = FileTier(directory, fsync=options.fsync, report=report, lock_wait_s=options.lock_wait_s, vault=vault)
        dram = ObjectStoreTier()
        budgets = options.config.budgets
        dram.write_once(min(MAX_WRITTEN_ONCE_BYTES, (budgets.dram_bytes + budgets.handoff_bytes) // 4))
        return NodeStore(options.config, dram, disk, node_id=node_id)

    @property
    def _opened(self) -> NodeStore:
        if self._store is None:
            raise self._error or FolderError("the warehouse is not open")
        return self._store

    def wait_ready(self) -> StoreStats:
        return self._opened.stats()

    @ray.method(concurrency_group="read")
    def prepare_load(self, query: LoadQuery) -> LoadGrant:
        return self._opened.prepare_load(query)

    @ray.method(concurrency_group="read")
    def complete_load(self, owner: str) -> None:
        self._opened.complete_load(owner)

    @ray.method(concurrency_group="read")
    def renew_lease(self, owner: str) -> None:
        self._opened.renew_lease(owner)

    @ray.method(concurrency_group="read")
    def read_image(self, extent_id: str, tier: Tier) -> Image | None:
        return self._opened.read_image(extent_id, tier)

    @ray.method(concurrency_group="read")
    def report_hang(self, reason: str) -> None:
        self._opened.report_hang(reason)

    @ray.method(concurrency_group="read")
    def report_unreadable(self, extent_id: str) -> None:
        self._opened.report_unreadable(extent_id)

    @ray.method(concurrency_group="read")
    def report_bad(self, extent_id: str, tier: Tier, reason: str) -> None:
        self._opened.report_bad(extent_id, tier, reason)

    @ray.method(concurrency_group="store")
    def prepare_store(self, offer: StoreOffer) -> StoreGrant:
        return self._opened.prepare_store(offer)

    @ray.method(concurrency_group="commit")
    def complete_store(self, extent_id: str, image: Image) -> bool:
        return self._opened.complete_store(extent_id, image)

    @ray.method(concurrency_group="commit")
    def abort_store(self, extent_ids: tuple[str, ...]) -> None:
        self._opened.abort_store(extent_ids)

    @ray.method(concurrency_group="commit")
    def purge(self, query: PurgeQuery) -> PurgeReceipt:
        return self._opened.purge(query)

    @ray.method(concurrency_group="read")
    def report_engine(self, load: ReplicaLoad, blocks: DeviceBlocks | None) -> bool:
        return self._opened.report_engine(load, blocks)

    @ray.method(concurrency_group="read")
    def forget_engine(self, replica_id: str) -> None:
        self._opened.forget_engine(replica_id)

    @ray.method(concurrency_group="events")
    def read_events(self, epoch: str | None, number: int, wait_s: float) -> EventBatch:
        return self._opened.read_events(epoch, number, wait_s)

    @ray.method(concurrency_group="read")
    def stats(self) -> StoreStats:
        return self._opened.stats()

    @ray.method(concurrency_group="commit")
    def flush(self, timeout_s: float) -> bool:
        return self._opened.flush(timeout_s)

    @ray.method(concurrency_group="commit")
    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def actor_name(node_id: str) -> str:
    return f"node-store-{node_id}"


def start_node_store(node_id: str, options: NodeStoreOptions) -> Any:
    """Start the node store of `node_id` (or find the one that runs there). Returns the actor's handle.

    Raises FolderError if its folder can't be used.
    """
    handle: Any = (
        ray.remote(concurrency_groups=_GROUPS)(NodeStoreActor)  # type: ignore[call-overload]
        .options(
            name=actor_name(node_id),
            namespace=NAMESPACE,
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(node_id, options)
    )
    try:
        ray.get(handle.wait_ready.remote())
    except ray.exceptions.RayTaskError as error:
        ray.kill(handle)
        raise (error.cause if isinstance(error.cause, FolderError) else error) from None
    return handle


def find_node_store(node_id: str) -> Any | None:
    """Handle of a running node store, None if there is none."""
    try:
        return ray.get_actor(actor_name(node_id), namespace=NAMESPACE)
    except ValueError:
        return None


def stop_node_store(handle: Any, timeout_s: float = 30.0) -> None:
    """Write what is dirty, close the folder, end the actor."""
    try:
        ray.get(handle.close.remote(), timeout=timeout_s)
    except (ray.exceptions.RayError, TimeoutError):
        logging.getLogger("tokenloft.warehouse").warning("a node store did not close in time")
    ray.kill(handle)


class RayStorePort:
    """`StorePort` over an actor handle.

    After a failure the store is left alone for a moment: an engine whose node store is restarting should
    answer at the speed of recompute, not at the speed of time-outs.
    """

    def __init__(self, node_id: str, retry_s: float = 1.0) -> None:
        self.node_id = node_id
        self._handle: Any | None = None
        self._retry_s = retry_s
        self._retry_at = 0.0

    def __repr__(self) -> str:
        return f"<RayStorePort {self.node_id}>"

    def _call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        reference = self._begin(method, *args)
        with self._translated_errors():
            return ray.get(reference, timeout=timeout_s)

    def _begin(self, method: str, *args: Any) -> Any:
        """Send a call; returns the reference to its result."""
        if time.monotonic() < self._retry_at:
            raise StoreUnavailable(f"node store {self.node_id} failed a moment ago")
        with self._translated_errors():
            handle = self._handle  # another thread's failure may set it to None at any time
            if handle is None:
                handle = self._handle = ray.get_actor(actor_name(self.node_id), namespace=NAMESPACE)
            return getattr(handle, method).remote(*args)

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except (ray.exceptions.RayError, FolderError, ValueError, TimeoutError) as error:
            self._handle = None
            self._retry_at = time.monotonic() + self._retry_s
            raise StoreUnavailable(f"node store {self.node_id}: {error}") from error

    def prepare_load(self, query: LoadQuery) -> LoadGrant:
        grant: LoadGrant = self._call("prepare_load", query)
        return grant

    def complete_load(self, owner: str) -> None:
        self._call("complete_load", owner)

    def renew_lease(self, owner: str) -> None:
        self._call("renew_lease", owner)

    def request_image(self, extent_id: str, tier: Tier) -> list[Any]:
        """A reference to the image, in the form of a dram piece's source; the node store may still be reading it."""
        return [self._begin("read_image", extent_id, tier)]

    def report_hang(self, reason: str) -> None:
        self._call("report_hang", reason)

    def report_unreadable(self, extent_id: str) -> None:
        self._call("report_unreadable", extent_id)

    def report_bad(self, extent_id: str, tier: Tier, reason: str) -> None:
        self._call("report_bad", extent_id, tier, reason)

    def prepare_store(self, offer: StoreOffer) -> StoreGrant:
        grant: StoreGrant = self._call("prepare_store", offer)
        return grant

    def complete_store(self, extent_id: str, image: Image) -> bool:
        return bool(self._call("complete_store", extent_id, image))

    def abort_store(self, extent_ids: tuple[str, ...]) -> None:
        self._call("abort_store", extent_ids)

    def purge(self, query: PurgeQuery) -> PurgeReceipt:
        receipt: PurgeReceipt = self._call("purge", query, timeout_s=PURGE_TIMEOUT_S)
        return receipt

    def report_engine(self, load: ReplicaLoad, blocks: DeviceBlocks | None) -> bool:
        return bool(self._call("report_engine", load, blocks))

    def forget_engine(self, replica_id: str) -> None:
        self._call("forget_engine", replica_id)

    def read_events(self, epoch: str | None, number: int, wait_s: float) -> EventBatch:
        batch: EventBatch = self._call("read_events", epoch, number, wait_s, timeout_s=wait_s + CALL_TIMEOUT_S)
        return batch

    def stats(self) -> StoreStats:
        stats: StoreStats = self._call("stats")
        return stats


def connect(
    node_id: str, *, is_local: bool, read_timeout_s: float = READ_TIMEOUT_S, vault: Vault | None = None
) -> WarehouseClient:
    """A client of the node store on `node_id`; `is_local` if this process runs on that node.

    `vault` decrypts that node's files where it is local; other nodes' stores send what they have decrypted.
    """
    return WarehouseClient(RayStorePort(node_id), _fetch, is_local, _prefetch, read_timeout_s, vault)


def _prefetch(source: list[Any]) -> None:
    """Begin to bring an object to this node."""
    ray.wait(source, timeout=0, fetch_local=True)


def _fetch(source: list[Any]) -> Image:
    return read_object(source[0])
