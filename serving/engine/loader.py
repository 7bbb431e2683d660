"""Moves blocks between the warehouse and the pool, on threads of its own, never in the step loop.

A load reads stored blocks into blocks that belong to one sequence already and that nobody else reads yet; a
store reads blocks that are pinned and will not change any more. So neither needs a lock on the pool's tensor.
Results go back to the step loop as calls of the callback that the job was given.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from cache.client import WarehouseClient
from cache.errors import StoreUnavailable
from cache.events import DeviceBlocks, ReplicaLoad, Tier
from cache.extent import ExtentHeader, Image
from cache.hashing import BlockHash
from cache.messages import LoadQuery, StoreOffer
from serving.engine.kv_pool import KVPool
from serving.engine.runner import set_num_threads

logger = logging.getLogger("tokenloft.engine")

ConnectStore = Callable[[str | None], WarehouseClient]
"""Makes a client of a node's store, None meaning this node's. Clients are not shared between threads."""


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Bring stored blocks of a prompt into the pool."""

    query: LoadQuery
    block_table: tuple[int, ...]
    """Pool blocks of the sequence, by position."""
    num_present_tokens: int
    """Leading tokens whose KV the pool has already; a match that ends before is not worth reading."""
    on_done: Callable[["LoadResult"], None]
    node_id: str | None = None
    """Whose store to ask, None for this node's."""
    keep_lease: bool = False
    """Leave the leases to a later job of the same owner."""


@dataclass(slots=True)
class LoadResult:
    """What a load brought."""

    num_tokens: int
    """Leading tokens whose KV is in the pool now."""
    num_matched: int = 0
    """Leading tokens that the store said it had."""
    by_tier: dict[Tier, int] = field(default_factory=dict)
    """Tokens brought, by the tier they came from."""
    is_remote: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Offer a chain of computed blocks to the warehouse."""

    offer: StoreOffer
    block_table: tuple[int, ...]
    on_done: Callable[[bool], object]
    """Told whether everything offered is stored now."""


class Loader:
    """One engine's threads for loads and stores. `close` waits for what has begun."""

    def __init__(self, connect: ConnectStore, pool: KVPool, num_load_threads: int = 2) -> None:
        self._connect = connect
        self._pool = pool
        self._clients = _ThreadClients()
        # Conversions of KV take one core each, not all: the step loop needs the others.
        self._loads = ThreadPoolExecutor(num_load_threads, "tokenloft-load", set_num_threads, (1,))
        # One thread, so that the extents of a chain are stored in order.
        self._stores = ThreadPoolExecutor(1, "tokenloft-store", set_num_threads, (1,))
        self._lock = threading.Lock()
        self._seconds: dict[Tier, float] = {}
        self._bytes: dict[Tier, int] = {}

    def __repr__(self) -> str:
        return f"<Loader {self.bandwidths()}>"

    def close(self) -> None:
        """Finish the stores that wait, drop the loads that have not begun."""
        self._loads.shutdown(wait=True, cancel_futures=True)
        self._stores.shutdown(wait=True)

    def _client(self, node_id: str | None) -> WarehouseClient:
        if node_id not in self._clients.by_node:
            self._clients.by_node[node_id] = self._connect(node_id)
        return self._clients.by_node[node_id]

    # -- loading ------------------------------------------------------------------------------------

    def load(self, job: LoadJob) -> None:
        """Start a load; `job.on_done` is called exactly once, from a thread of the loader, unless that is closed."""
        self._loads.submit(self._run_load, job).add_done_callback(_log_failure)

    def _run_load(self, job: LoadJob) -> None:
        started = time.perf_counter()
        result = LoadResult(job.num_present_tokens, is_remote=job.node_id is not None)
        try:
            self._load(job, result)
        except StoreUnavailable as error:
            logger.info("no load for %s: %s", job.query.owner, error)
        finally:
            result.seconds = time.perf_counter() - started
            job.on_done(result)

    def _load(self, job: LoadJob, result: LoadResult) -> None:
        client = self._client(job.node_id)
        query = job.query
        grant = client.lookup(query)
        result.num_matched = grant.num_tokens
        try:
            if grant.num_tokens > job.num_present_tokens:
                for block in client.read(query, grant):
                    self._pool.import_(
                        job.block_table[block.index], block.num_tokens, block.payload, block.stored_tokens
                    )
                    end = block.index * query.block_size + block.num_tokens
                    gained = max(0, end - result.num_tokens)
                    result.num_tokens += gained
                    result.by_tier[block.tier] = result.by_tier.get(block.tier, 0) + gained
        finally:
            self._note_speed(client)
            if not job.keep_lease:
                client.release(query.owner)

    def _note_speed(self, client: WarehouseClient) -> None:
        with self._lock:
            for tier, speed in client.speeds.items():
                self._seconds[tier] = self._seconds.get(tier, 0.0) + speed.seconds
                self._bytes[tier] = self._bytes.get(tier, 0) + speed.num_bytes
        client.speeds.clear()

    def bandwidths(self) -> tuple[tuple[Tier, float], ...]:
        """Bytes per second loaded from each tier so far, copying into the pool included."""
        with self._lock:
            return tuple((tier, self._bytes[tier] / seconds) for tier, seconds in self._seconds.items() if seconds)

    def release(self, owner: str, node_id: str | None = None) -> None:
        """End the leases that jobs with `keep_lease` have left."""
        self._loads.submit(self._run_release, owner, node_id).add_done_callback(_log_failure)

    def _run_release(self, owner: str, node_id: str | None) -> None:
        try:
            self._client(node_id).release(owner)
        except StoreUnavailable:
            logger.debug("the leases of %s lapse by themselves", owner)

    # -- storing ------------------------------------------------------------------------------------

    def store(self, job: StoreJob) -> None:
        """Start a store; `job.on_done` is called exactly once, from a thread of the loader."""
        self._stores.submit(self._run_store, job).add_done_callback(_log_failure)

    def after_stores(self, then: Callable[[], None]) -> None:
        """Call `then`, from a thread of the loader, once every store that was asked for before has ended."""
        self._stores.submit(then).add_done_callback(_log_failure)

    def _run_store(self, job: StoreJob) -> None:
        is_stored = False
        try:
            is_stored = self._client(None).store(job.offer, self._filler(job))
        except StoreUnavailable as error:
            logger.info("a turn was not stored: %s", error)
        finally:
            job.on_done(is_stored)

    def _filler(self, job: StoreJob) -> Callable[[ExtentHeader, Image], None]:
        offer = job.offer
        first_after: dict[BlockHash, int] = {offer.root_hash: 0}
        first_after.update({h: index + 1 for index, h in enumerate(offer.block_hashes)})

        def fill(header: ExtentHeader, image: Image) -> None:
            first = first_after[header.parent_hash]
            blocks = [(job.block_table[first + at], len(header.block_token_ids(at))) for at in range(header.num_blocks)]
            self._pool.export(blocks, image[header.payload_offset :])

        return fill

    # -- reporting ----------------------------------------------------------------------------------

    def report(self, load: ReplicaLoad, blocks: DeviceBlocks | None, on_done: Callable[[bool], object]) -> None:
        """Tell the node store this engine's state; `on_done` is told whether the store knew the engine before."""
        self._loads.submit(self._run_report, load, blocks, on_done).add_done_callback(_log_failure)

    def _run_report(self, load: ReplicaLoad, blocks: DeviceBlocks | None, on_done: Callable[[bool], object]) -> None:
        was_known = False
        try:
            was_known = self._client(None).port.report_engine(load, blocks)
        except StoreUnavailable:
            logger.debug("the node store could not be told the engine's state")
        finally:
            on_done(was_known)

    def forget(self, replica_id: str) -> None:
        """Tell the node store that this engine leaves, and wait until it knows."""
        try:
            self._client(None).port.forget_engine(replica_id)
        except StoreUnavailable:
            logger.debug("the node store could not be told that the engine leaves")


def _log_failure(job: "Future[None]") -> None:
    """What no job should raise would otherwise vanish with its future."""
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.error("a job of the loader failed", exc_info=error)


class _ThreadClients(threading.local):
    """Each thread's own clients."""

    def __init__(self) -> None:
        self.by_node: dict[str | None, WarehouseClient] = {}
