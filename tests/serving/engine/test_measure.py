"""An engine's reports: when they are sent, what a lost one costs, and the running averages."""

import queue
from collections.abc import Callable

import pytest

from cache.client import WarehouseClient
from cache.errors import StoreUnavailable
from cache.events import DeviceBlocks, ReplicaLoad
from cache.extent import NOBODY
from cache.hashing import BlockHash, as_token_ids, chain_hashes
from cache.node_store import NodeStore
from cache.tiers.memory import MemoryTier
from serving.engine.block_pool import BlockPool, Owner
from serving.engine.kv_pool import KVLayout, KVPool
from serving.engine.loader import Loader
from serving.engine.measure import IDLE_REPORT_INTERVAL_S, REPORT_INTERVAL_S, Reporter, Speed
from serving.engine.scheduler import ScheduledPart, Scheduler
from serving.engine.sequence import EngineRequest, Listener, Sequence
from serving.protocol import SamplingParams
from tests.cache.chains import BLOCK_SIZE, ROOT, store_config


class LossyStore(NodeStore):
    """A node store that can be out of reach; notes what reaches it."""

    is_away = False

    def __init__(self) -> None:
        super().__init__(store_config(), MemoryTier(), None)
        self.reports: list[DeviceBlocks] = []

    def report_engine(self, load: ReplicaLoad, blocks: DeviceBlocks | None) -> bool:
        if self.is_away:
            raise StoreUnavailable("away")
        assert blocks is not None
        self.reports.append(blocks)
        return super().report_engine(load, blocks)

    def known(self) -> set[BlockHash]:
        """What it believes to be in the engine's pool."""
        return set(self._devices["engine"].hashes)


class CountingLoader(Loader):
    """A loader that counts the reports that it is asked to send."""

    num_reports = 0

    def report(self, load: ReplicaLoad, blocks: DeviceBlocks | None, on_done: Callable[[bool], object]) -> None:
        self.num_reports += 1
        super().report(load, blocks, on_done)


class Bench:
    """A reporter whose clock and whose step loop are the test's."""

    def __init__(self) -> None:
        self.store = LossyStore()
        self.pool = BlockPool(4, BLOCK_SIZE)
        self.scheduler = Scheduler(self.pool, 8, 64)
        kv = KVPool(KVLayout(1, 1, 4, BLOCK_SIZE, "float32"), 1)
        self.loader = CountingLoader(lambda node_id: WarehouseClient(self.store), kv)
        self.now_s = 100.0
        self.inbox: queue.Queue[Callable[[], None]] = queue.Queue()
        self.reporter = Reporter(
            "engine", "decode", self.scheduler, Speed(), self.loader, self.inbox.put, lambda: self.now_s
        )

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *exc: object) -> None:
        self.loader.close()
        self.store.close()

    def begin(self, *, is_idle: bool = False) -> bool:
        """Let the reporter report if it wants to; whether it did."""
        before = self.loader.num_reports
        self.reporter.report(is_idle=is_idle)
        return self.loader.num_reports > before

    def end(self) -> None:
        """Let the step loop hear how the report went."""
        self.inbox.get(timeout=30)()

    def report(self, *, is_idle: bool = False) -> bool:
        if not self.begin(is_idle=is_idle):
            return False
        self.end()
        return True

    def report_later(self) -> bool:
        """Report as an idle engine would a second later."""
        self.now_s += 1.0
        return self.report(is_idle=True)

    def cache_chain(self, tokens: list[int]) -> list[BlockHash]:
        ids = as_token_ids(tokens)
        hashes = chain_hashes(ROOT, ids, BLOCK_SIZE)
        table = self.pool.allocate(len(hashes))
        assert table is not None
        for index, one in enumerate(hashes):
            parent = hashes[index - 1] if index else ROOT
            block = ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
            self.pool.register(table[index], one, parent, block, Owner(ROOT, NOBODY))
        self.pool.release(table)
        return hashes


def test_reports_come_no_closer_than_the_interval() -> None:
    with Bench() as b:
        assert b.report()
        b.now_s += REPORT_INTERVAL_S * 0.9
        assert not b.report()
        b.now_s += REPORT_INTERVAL_S * 0.2
        assert b.report()
        assert b.store.known() == set()


def test_an_idle_engine_reports_what_changed_and_else_seldom() -> None:
    with Bench() as b:
        b.report()
        assert b.report_later(), "the store did not know the engine: all goes once more"
        b.now_s += REPORT_INTERVAL_S * 2
        assert not b.report(is_idle=True)
        hashes = b.cache_chain(list(range(8)))
        assert b.report(is_idle=True)
        assert b.store.known() == set(hashes)
        b.now_s += IDLE_REPORT_INTERVAL_S * 0.9
        assert not b.report(is_idle=True)
        b.now_s += IDLE_REPORT_INTERVAL_S * 0.2
        assert b.report(is_idle=True)
        assert b.store.reports[-1] == DeviceBlocks("engine", b"", b"")


def test_one_report_at_a_time() -> None:
    with Bench() as b:
        assert b.begin()
        b.now_s += 60
        assert not b.begin()
        b.end()
        assert b.begin()
        b.end()


def test_after_a_lost_report_all_is_sent_again() -> None:
    with Bench() as b:
        before = b.cache_chain(list(range(8)))
        b.report()
        assert b.store.known() == set(before)
        b.store.is_away = True
        b.cache_chain(list(range(100, 112)))  # evicts the first chain's last block
        assert b.report_later()
        assert b.report_later(), "what is lost is sent again, idle or not"
        b.store.is_away = False
        b.cache_chain(list(range(200, 204)))
        assert b.report_later()
        assert b.store.known() == b.pool.all_hashes(), "neither what came nor what left meanwhile is missing"
        assert not b.report_later()


def test_what_left_in_a_lost_report_and_came_back_is_held() -> None:
    with Bench() as b:
        (first,) = b.cache_chain([1, 2, 3, 4])
        b.report()
        b.store.is_away = True
        b.cache_chain(list(range(100, 116)))
        assert first not in b.pool.all_hashes()
        b.report_later()
        b.cache_chain([1, 2, 3, 4])
        b.store.is_away = False
        b.report_later()
        assert first in b.store.known()
        assert b.store.known() == b.pool.all_hashes()


def sequence_of(num_tokens: int) -> Sequence:
    ids = as_token_ids(range(num_tokens))
    request = EngineRequest("r", ids, ROOT, tuple(chain_hashes(ROOT, ids, BLOCK_SIZE)), SamplingParams(4))
    return Sequence(request, Listener(), BLOCK_SIZE, 0.0)


def test_a_report_tells_the_load() -> None:
    with Bench() as b:
        b.scheduler.add(sequence_of(12))
        b.scheduler.add(sequence_of(9))
        b.scheduler.admit()
        b.report()
        load = b.store._devices["engine"].load
        assert (load.num_running, load.num_waiting, load.queued_prefill_tokens) == (1, 1, 21)
        assert (load.replica_id, load.role) == ("engine", "decode")


def test_speed_keeps_decodes_and_prefills_apart() -> None:
    speed, sequence = Speed(), sequence_of(100)
    decode, chunk, scrap = ScheduledPart(sequence, 1), ScheduledPart(sequence, 63), ScheduledPart(sequence, 5)
    speed.note([decode, decode], 0.5)
    assert (speed.decode_step_s, speed.prefill_tokens_per_s) == (0.5, 0.0)
    speed.note([decode, chunk], 0.5)
    assert speed.prefill_tokens_per_s == 128.0
    speed.note([scrap], 100.0)
    speed.note([chunk, decode], 1.0)
    assert speed.prefill_tokens_per_s == pytest.approx(128 * 0.8 + 64 * 0.2)
    assert speed.decode_step_s == 0.5


def test_a_new_store_is_told_all_holdings() -> None:
    with Bench() as b:
        hashes = b.cache_chain(list(range(8)))
        b.report_later()
        b.report_later()
        b.store.forget_engine("engine")  # as after a restart, of which the engine knows nothing
        for _ in range(2):
            b.now_s += IDLE_REPORT_INTERVAL_S
            b.report(is_idle=True)
        assert b.store.known() == set(hashes)


def test_what_was_measured_can_be_forgotten() -> None:
    speed, sequence = Speed(), sequence_of(100)
    speed.note([ScheduledPart(sequence, 100)], 50.0)
    assert speed.prefill_tokens_per_s == pytest.approx(2)
    speed.reset()
    assert speed.prefill_tokens_per_s == speed.first_tokens_per_s == speed.decode_step_s == 0
    speed.note([ScheduledPart(sequence, 100)], 0.5)
    assert speed.prefill_tokens_per_s == pytest.approx(200), "nothing of the slow step is left"
