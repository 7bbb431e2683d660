"""Loads and stores over a real node store: bytes arrive whole, failures are told, each callback is called once."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from cache.client import TierSpeed, WarehouseClient
from cache.errors import StoreUnavailable
from cache.events import DeviceBlocks, ReplicaLoad, Tier
from cache.extent import Image
from cache.hashing import as_token_ids, chain_hashes
from cache.messages import LoadGrant, LoadQuery, StoreGrant, StoreOffer
from cache.node_store import NodeStore
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from serving.engine.kv_pool import KVLayout, KVPool
from serving.engine.loader import Loader, LoadJob, LoadResult, StoreJob
from tests.cache.chains import BLOCK_SIZE, ROOT, SHAPE, budgets, kv_of, offer, query, store_config

TIMEOUT_S = 30.0
TOKENS = list(range(100, 110))
"""Two full blocks and a tail of two."""
WRITER, READER = (4, 5, 6), (9, 8, 7)
"""Block tables: the reader's blocks are others, in another order."""
LOAD = ReplicaLoad("engine", "decode", 0, 0, 0, 0.0, 0.0)


class FailingStore(NodeStore):
    """A node store that raises what it is told to, where a client would first meet it."""

    failure: Exception | None = None

    def prepare_load(self, query: LoadQuery) -> LoadGrant:
        self._fail()
        return super().prepare_load(query)

    def prepare_store(self, offer: StoreOffer) -> StoreGrant:
        self._fail()
        return super().prepare_store(offer)

    def report_engine(self, load: ReplicaLoad, blocks: DeviceBlocks | None) -> bool:
        self._fail()
        return super().report_engine(load, blocks)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


@dataclass
class Bench:
    """A loader between a pool and a node store."""

    store: FailingStore
    pool: KVPool
    loader: Loader
    loads: queue.Queue[LoadResult] = field(default_factory=queue.Queue)
    stores: queue.Queue[bool] = field(default_factory=queue.Queue)

    def write(self, tokens: list[int], table: tuple[int, ...] = WRITER) -> None:
        """Put the true KV of a chain into the pool, as if it had been computed."""
        for index, payload in enumerate(true_kv(tokens)):
            self.pool.import_(table[index], len(payload) // SHAPE.bytes_per_token, payload)

    def store_chain(self, asked: StoreOffer, table: tuple[int, ...] = WRITER) -> bool:
        self.loader.store(StoreJob(asked, table, self.stores.put))
        return self.stores.get(timeout=TIMEOUT_S)

    def load(self, tokens: list[int], *, num_present: int = 0, keep_lease: bool = False) -> LoadResult:
        asked = query(tokens, first=num_present // BLOCK_SIZE)
        self.loader.load(LoadJob(asked, READER, num_present, self.loads.put, keep_lease=keep_lease))
        return self.loads.get(timeout=TIMEOUT_S)

    def check_loaded(self, tokens: list[int], begin: int = 0) -> None:
        """The reader's blocks from token `begin` on hold the true KV of `tokens`."""
        for index, payload in enumerate(true_kv(tokens)):
            if (index + 1) * BLOCK_SIZE > begin:
                out = np.empty_like(payload)
                self.pool.export([(READER[index], len(payload) // SHAPE.bytes_per_token)], out)
                assert np.array_equal(out, payload)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def true_kv(tokens: list[int]) -> Iterator[Image]:
    ids = as_token_ids(tokens)
    hashes = chain_hashes(ROOT, ids, BLOCK_SIZE)
    for start in range(0, len(ids), BLOCK_SIZE):
        parent = hashes[start // BLOCK_SIZE - 1] if start else ROOT
        yield kv_of(parent, ids[start : start + BLOCK_SIZE])


@contextmanager
def bench(directory: Path | None = None) -> Iterator[Bench]:
    disk = FileTier(directory) if directory else None
    store = FailingStore(store_config(budgets(blocks=2)), MemoryTier(), disk)
    with store:
        pool = KVPool(KVLayout(SHAPE.num_layers, SHAPE.num_kv_heads, SHAPE.head_dim, BLOCK_SIZE, SHAPE.dtype), 12)
        loader = Loader(lambda node_id: WarehouseClient(store), pool)
        try:
            yield Bench(store, pool, loader)
        finally:
            loader.close()
        store.check_integrity()


def test_what_is_stored_from_one_table_is_loaded_into_another() -> None:
    with bench() as b:
        b.write(TOKENS)
        assert b.store_chain(offer(TOKENS))
        result = b.load([*TOKENS, 1, 2])
        assert (result.num_tokens, result.num_matched, result.by_tier) == (10, 10, {Tier.DRAM: 10})
        assert not result.is_remote
        b.check_loaded(TOKENS)
        ((tier, bandwidth),) = b.loader.bandwidths()
        assert tier is Tier.DRAM
        assert bandwidth > 0


def test_bandwidths_follow_the_tier_and_a_few_bytes_say_little() -> None:
    with bench() as b:
        client = WarehouseClient(b.store)

        def read(num_bytes: float, seconds: float) -> float:
            client.speeds[Tier.DISK] = TierSpeed(int(num_bytes), seconds)
            b.loader._note_speed(client)
            assert not client.speeds
            return dict(b.loader.bandwidths())[Tier.DISK]

        assert read(200e6, 0.2) == pytest.approx(1e9)
        assert read(1e6, 0.01) > 9e8
        assert read(100e6, 5.0) < 3e7, "it has become slow"
        for _ in range(3):
            last = read(200e6, 0.2)
        assert last > 9e8, "and fast again"


def test_a_load_brings_only_what_is_not_there_yet() -> None:
    with bench() as b:
        b.write(TOKENS)
        b.store_chain(offer(TOKENS))
        result = b.load(TOKENS, num_present=5)
        assert (result.num_tokens, result.by_tier) == (10, {Tier.DRAM: 5})
        b.check_loaded(TOKENS, begin=5)
        assert b.load(TOKENS[:8], num_present=8).by_tier == {}


def test_a_miss_brings_nothing() -> None:
    with bench() as b:
        result = b.load(TOKENS, num_present=3)
        assert (result.num_tokens, result.num_matched, result.by_tier) == (3, 0, {})


def test_a_damaged_block_ends_the_load_before_it(tmp_path: Path) -> None:
    with bench(tmp_path) as b:
        b.write(TOKENS)
        b.store_chain(offer(TOKENS[:8]))
    (path,) = tmp_path.glob("extents/*/*/*.kv")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with bench(tmp_path) as b:
        result = b.load(TOKENS)
        assert (result.num_tokens, result.num_matched, result.by_tier) == (4, 8, {Tier.DISK: 4})
        b.check_loaded(TOKENS[:4])
        assert b.store.stats().counters["quarantined_extents"] == 1
        assert b.load(TOKENS).num_tokens == 0, "a bad extent is not read twice"


def test_a_file_that_is_gone_ends_the_load_before_it(tmp_path: Path) -> None:
    with bench(tmp_path) as b:
        b.write(TOKENS)
        b.store_chain(offer(TOKENS))
    with bench(tmp_path) as b:
        paths = sorted(tmp_path.glob("extents/*/*/*.kv"), key=lambda path: path.stat().st_size)
        assert len(paths) == 2, "the tail is an extent of its own"
        paths[0].unlink()
        result = b.load(TOKENS)
        assert (result.num_tokens, result.num_matched) == (8, 10)
        b.check_loaded(TOKENS[:8])


@pytest.mark.parametrize("failure", [StoreUnavailable("gone"), ValueError("a bug")], ids=["gone", "unexpected"])
def test_a_store_that_fails_is_a_miss_told_once(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with bench() as b:
        b.write(TOKENS)
        b.store_chain(offer(TOKENS))
        b.store.failure = failure
        assert b.load(TOKENS, num_present=3).num_tokens == 3
        assert not b.store_chain(offer(list(range(8))))
        reported: queue.Queue[bool] = queue.Queue()
        b.loader.report(LOAD, None, reported.put)
        assert reported.get(timeout=TIMEOUT_S) is False
        b.store.failure = None
        assert b.load(TOKENS).num_tokens == 10, "the threads go on"
        for was_known in (False, True):  # the first report that arrives comes from a stranger
            b.loader.report(LOAD, None, reported.put)
            assert reported.get(timeout=TIMEOUT_S) is was_known
    assert b.loads.empty()
    assert b.stores.empty()
    assert reported.empty()
    shown = [record for record in caplog.records if record.message == "a job of the loader failed"]
    assert len(shown) == (3 if isinstance(failure, ValueError) else 0)


def test_a_node_without_a_store_is_a_miss() -> None:
    pool = KVPool(KVLayout(2, 1, 4, BLOCK_SIZE, "float32"), 12)
    asked_for: list[str | None] = []

    def connect(node_id: str | None) -> WarehouseClient:
        asked_for.append(node_id)
        raise StoreUnavailable(f"no node store on {node_id}")

    loader = Loader(connect, pool)
    results: queue.Queue[LoadResult] = queue.Queue()
    loader.load(LoadJob(query(TOKENS), READER, 0, results.put, "far"))
    result = results.get(timeout=TIMEOUT_S)
    assert result.num_tokens == 0
    assert result.is_remote
    loader.release("reader", "far")
    wait_until(lambda: asked_for == ["far", "far"])
    loader.close()


def test_a_refused_store_is_told() -> None:
    store = FailingStore(store_config(budgets(dram=100, disk=0, handoff=100)), MemoryTier(), None)
    pool = KVPool(KVLayout(2, 1, 4, BLOCK_SIZE, "float32"), 12)
    b = Bench(store, pool, Loader(lambda node_id: WarehouseClient(store), pool))
    b.write(TOKENS)
    assert not b.store_chain(offer(TOKENS))
    assert not b.store_chain(offer(TOKENS, handoff_owner="reader", with_tail=False))
    b.loader.close()
    store.close()


def test_stores_are_done_in_order_and_close_waits_for_all_of_them() -> None:
    with bench() as b:
        b.write(TOKENS)
        done: list[tuple[int, bool, str]] = []

        for num_tokens in (4, 8, 10):

            def on_done(is_stored: bool, num_tokens: int = num_tokens) -> None:
                done.append((num_tokens, is_stored, threading.current_thread().name))

            b.loader.store(StoreJob(offer(TOKENS[:num_tokens]), WRITER, on_done))
        b.loader.close()
        assert [(num_tokens, is_stored) for num_tokens, is_stored, _ in done] == [(4, True), (8, True), (10, True)]
        assert len({name for _, _, name in done}) == 1


def test_handed_off_blocks_stay_until_their_owner_lets_go() -> None:
    with bench() as b:
        b.write(TOKENS)
        assert b.store_chain(offer(TOKENS[:8], with_tail=False, handoff_owner="reader", is_transient=True))
        for _ in range(2):
            assert b.load(TOKENS, keep_lease=True).num_tokens == 8
        assert b.store.stats().handoff_bytes > 0
        b.loader.release("reader")
        wait_until(lambda: b.store.stats().handoff_bytes == 0)
