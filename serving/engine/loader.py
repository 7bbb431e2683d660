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
from contextlib import closing
from dataclasses import dataclass, field, replace

from cache.client import TierSpeed, WarehouseClient
from cache.errors import StoreUnavailable
from cache.events import DeviceBlocks, ReplicaLoad, Tier
from cache.extent import ExtentHeader, Image
from cache.hashing import BlockHash
from cache.messages import LoadGrant, LoadQuery, StoreOffer
from cache.read_ahead import Block
from serving.engine.cores import begin_background_thread
from serving.engine.kv_pool import KVPool
from serving.engine.meeting import Meeting
from serving.protocol import LoadPlan

logger = logging.getLogger("tokenloft.engine")

ConnectStore = Callable[[str | None], WarehouseClient]
"""Makes a client of a node's store, None meaning this node's. Clients are not shared between threads."""

_MAX_PASSES = 3
"""Tries at what a load from the back has not got to because of a block that could not be had."""
_SPEED_HALF_LIFE_S = 1.0
_SPEED_HALF_LIFE_BYTES = 32e6
"""After reading for so long, or so much, what was measured before counts half: so both a tier that becomes slow
and one that becomes fast again are noticed soon, and a few blocks say little."""


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
class MeetingJob:
    """Bring stored blocks of a prompt into the pool, beside a step loop that may compute from the front."""

    query: LoadQuery
    """The job's owner is its own: its leases end with it."""
    block_table: tuple[int, ...]
    meeting: Meeting
    num_present_tokens: int
    make_plan: Callable[[LoadGrant], LoadPlan]
    on_planned: Callable[[LoadPlan], object]
    """Called at most once, as soon as the store has answered, unless it has nothing."""
    on_done: Callable[[float], object]
    """Called exactly once, with the seconds that the job took. Nothing is written any more."""


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
        self._loads = ThreadPoolExecutor(num_load_threads, "tokenloft-load", begin_background_thread)
        # One thread, so that the extents of a chain are stored in order.
        self._stores = ThreadPoolExecutor(1, "tokenloft-store", begin_background_thread)
        self._lock = threading.Lock()
        self._bytes_per_s: dict[Tier, float] = {}

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
                    self._import(job.block_table, block)
                    end = block.index * query.block_size + block.num_tokens
                    gained = max(0, end - result.num_tokens)
                    result.num_tokens += gained
                    result.by_tier[block.tier] = result.by_tier.get(block.tier, 0) + gained
        finally:
            self._note_speed(client)
            if not job.keep_lease:
                client.release(query.owner)

    def load_to_meet(self, job: MeetingJob) -> None:
        """Start a load that meets what is computed; see `Meeting`."""
        self._loads.submit(self._run_to_meet, job).add_done_callback(_log_failure)

    def _run_to_meet(self, job: MeetingJob) -> None:
        started = time.perf_counter()
        try:
            self._load_to_meet(job)
        except StoreUnavailable as error:
            logger.info("no load for %s: %s", job.query.owner, error)
        finally:
            job.on_done(time.perf_counter() - started)

    def _load_to_meet(self, job: MeetingJob) -> None:
        client, query, meeting = self._client(None), job.query, job.meeting
        grant = client.lookup(query)
        try:
            if grant.num_tokens <= job.num_present_tokens:
                return
            plan = job.make_plan(grant)
            meeting.begin_load(plan, grant.num_tokens, time.perf_counter())
            job.on_planned(plan)
            if plan.kind == "compute":
                return
            if not meeting.is_turned:
                self._load_blocks(client, job, query, grant, backwards=False)
            for _ in range(_MAX_PASSES if meeting.is_turned else 0):
                if meeting.gap() is not None:
                    self._load_blocks(client, job, query, grant, backwards=True)
                gap = meeting.gap()
                if gap is None:
                    return
                meeting.begin_pass()
                query = _only_before(gap[1], query)
                grant = client.lookup(query)
        finally:
            self._note_speed(client)
            client.release(query.owner)

    def _load_blocks(
        self, client: WarehouseClient, job: MeetingJob, query: LoadQuery, grant: LoadGrant, *, backwards: bool
    ) -> None:
        """As many blocks, in one direction, as the meeting wants and the store gives."""
        meeting = job.meeting
        with closing(client.read(query, grant, backwards=backwards)) as blocks:
            for block in blocks:
                begin = block.index * query.block_size
                if not (meeting.claim_previous(begin) if backwards else meeting.claim_next()):
                    return
                self._import(job.block_table, block)
                meeting.wrote(begin, begin + block.num_tokens, block.tier)

    def _import(self, block_table: tuple[int, ...], block: Block) -> None:
        self._pool.import_(block_table[block.index], block.num_tokens, block.payload, block.stored_tokens)

    def _note_speed(self, client: WarehouseClient) -> None:
        with self._lock:
            for tier, speed in client.speeds.items():
                self._bytes_per_s[tier] = _mixed(self._bytes_per_s.get(tier), speed)
        client.speeds.clear()

    def bandwidths(self) -> tuple[tuple[Tier, float], ...]:
        """Bytes per second loaded from each tier of late, copying into the pool included."""
        with self._lock:
            return tuple(self._bytes_per_s.items())

    def release(self, owner: str, node_id: str | None = None) -> None:
        """End the leases that jobs with `keep_lease` have left.

        In order with the stores: a tail that was handed off and goes now would else pass for the one that is to stay.
        """
        self._stores.submit(self._run_release, owner, node_id).add_done_callback(_log_failure)

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


def _mixed(before: float | None, speed: TierSpeed) -> float:
    """A geometric mean of bandwidths, as they may be orders of magnitude apart."""
    latest = max(1, speed.num_bytes) / max(1e-9, speed.seconds)
    if before is None:
        return latest
    kept = 0.5 ** (speed.seconds / _SPEED_HALF_LIFE_S + speed.num_bytes / _SPEED_HALF_LIFE_BYTES)
    return float(before**kept * latest ** (1 - kept))


def _only_before(num_tokens: int, query: LoadQuery) -> LoadQuery:
    """The query for the first `num_tokens` tokens alone."""
    hashes = query.block_hashes[: num_tokens // query.block_size]
    return replace(query, block_hashes=hashes, token_ids=query.token_ids[:num_tokens])


def _log_failure(job: "Future[None]") -> None:
    """What no job should raise would otherwise vanish with its future."""
    error = None if job.cancelled() else job.exception()
    if error is not None:
        logger.error("a job of the loader failed", exc_info=error)


class _ThreadClients(threading.local):
    """Each thread's own clients."""

    def __init__(self) -> None:
        self.by_node: dict[str | None, WarehouseClient] = {}
