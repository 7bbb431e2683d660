"""Blocks are given back once and only when nobody reads or writes them, whatever is under way when a request ends."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache.extent import Origin
from cache.messages import LoadGrant, LoadQuery, PurgeQuery, StoreGrant, StoreOffer
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.memory import MemoryTier
from serving.engine.sequence import EngineRequest, Listener, Sequence
from serving.protocol import SamplingParams
from tests.oracle import Oracle
from tests.serving.engine.harness import (
    BLOCK_SIZE,
    ROOT,
    EngineUnderTest,
    Handoff,
    Pending,
    make_engine,
    open_store,
    prompt_of,
    running,
)

TIMEOUT_S = 30.0
LONG = SamplingParams(200, temperature=1.0, seed=1)


class Gate:
    """Holds a caller back until it is opened."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self._may_pass = threading.Event()
        self._may_pass.set()

    def shut(self) -> None:
        self.is_reached.clear()
        self._may_pass.clear()

    def open(self) -> None:
        self._may_pass.set()

    def wait_for_caller(self) -> None:
        assert self.is_reached.wait(TIMEOUT_S)

    def pass_through(self) -> None:
        self.is_reached.set()
        assert self._may_pass.wait(TIMEOUT_S)


class GatedStore(NodeStore):
    """A node store whose loads and stores can be held back."""

    def __init__(self, handoff_bytes: int = 64 << 20) -> None:
        budgets = Budgets(64 << 20, 0, handoff_bytes)
        super().__init__(NodeStoreConfig(budgets, store_wait_s=0.0), MemoryTier(), None)
        self.loads = Gate()
        self.stores = Gate()

    def prepare_load(self, query: LoadQuery) -> LoadGrant:
        self.loads.pass_through()
        return super().prepare_load(query)

    def prepare_store(self, offer: StoreOffer) -> StoreGrant:
        self.stores.pass_through()
        return super().prepare_store(offer)


@contextmanager
def gated_store(handoff_bytes: int = 64 << 20) -> Iterator[GatedStore]:
    """A gated store that ends up whole, with nothing leased and nothing handed off."""
    store = GatedStore(handoff_bytes)
    with store:
        try:
            yield store
        finally:
            store.loads.open()
            store.stores.open()
        store.check_integrity()


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.005)


def num_used(engine: EngineUnderTest) -> float:
    """Blocks in use after all commands so far."""
    engine.engine.check_integrity()
    return engine.engine.stats()["num_used_blocks"]


def is_still(engine: EngineUnderTest) -> bool:
    stats = engine.engine.stats()
    return stats["num_used_blocks"] == stats["num_waiting"] == stats["num_admitted"] == 0


def test_cancel_while_a_load_is_in_flight_frees_the_blocks_when_it_ends(tiny_model_dir: Path) -> None:
    prompt = prompt_of(BLOCK_SIZE * 4)
    with gated_store() as store:
        with running(make_engine(tiny_model_dir, store, replica_id="writer")) as engine:
            engine.greedy(prompt, 4)
        with running(make_engine(tiny_model_dir, store)) as engine:
            store.loads.shut()
            engine.submit(prompt, LONG, request_id="loading")
            store.loads.wait_for_caller()
            engine.engine.cancel("loading")
            engine.engine.cancel("loading")
            assert num_used(engine) == 4, "a loader thread writes into them"
            # Its blocks are not handed to the next one either.
            store.loads.open()
            wait_until(lambda: is_still(engine))
            assert engine.greedy(prompt, 4).cost.prompt_tokens == len(prompt)


def test_blocks_stay_until_their_store_has_read_them(tiny_model_dir: Path) -> None:
    with gated_store() as store, running(make_engine(tiny_model_dir, store)) as engine:
        store.stores.shut()
        engine.greedy(prompt_of(BLOCK_SIZE * 4 - 3), 4)
        store.stores.wait_for_caller()
        assert num_used(engine) == 4
        store.stores.open()
        wait_until(lambda: is_still(engine))
        assert engine.engine.counters["committed_turns"] == 1


def test_cancel_while_it_decodes_commits_what_was_computed(tiny_model_dir: Path) -> None:
    prompt = prompt_of(50)
    with gated_store() as store:
        with running(make_engine(tiny_model_dir, store, replica_id="writer")) as engine:
            pending = engine.submit(prompt, LONG, request_id="r")
            pending.first()
            engine.engine.cancel("r")
            wait_until(lambda: engine.engine.counters["committed_turns"] == 1)
            assert is_still(engine)
        with running(make_engine(tiny_model_dir, store)) as engine:
            assert engine.greedy(prompt, 4).cost.dram_tokens == len(prompt) - 1


def test_stop_while_loads_and_stores_are_in_flight_answers_everybody(tiny_model_dir: Path) -> None:
    with gated_store() as store:
        engine = make_engine(tiny_model_dir, store)
        engine.start()
        under_test = EngineUnderTest(engine)
        store.stores.shut()
        under_test.greedy(prompt_of(40), 4)
        store.stores.wait_for_caller()
        store.loads.shut()
        loading = under_test.submit(prompt_of(40, seed=2), LONG)
        store.loads.wait_for_caller()
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        assert loading.wait().finish_reason == "lost"
        store.loads.open()
        store.stores.open()
        stopper.join(TIMEOUT_S)
        assert not stopper.is_alive()
        assert store.stats().counters["stored_blocks"] > 0, "a store under way is finished"


# -- handoff ----------------------------------------------------------------------------------------


class SlowPrefill:
    """Plays the prefill replica by hand: a real engine computes, the test says when decode hears of it."""

    def __init__(self, prefill: EngineUnderTest, decode: EngineUnderTest) -> None:
        self.prefill = prefill
        self.decode = decode
        self.is_asked = threading.Event()
        self.sequences: list[Sequence] = []

    def submit(self, prompt: list[int], sampling: SamplingParams, request_id: str = "r") -> Pending:
        pending = Pending()

        def ask(sequence: Sequence) -> bool:
            self.sequences.append(sequence)
            self.is_asked.set()
            return True

        listener = Listener(on_batch=pending.batches.put, ask_prefill=ask)
        self.decode.submit(prompt, sampling, listener=listener, request_id=request_id)
        assert self.is_asked.wait(TIMEOUT_S)
        return pending

    def compute(self, num_blocks: int) -> None:
        """Compute and hand off the first blocks; done when they are in the store."""
        sequence, is_done = self.sequences[-1], threading.Event()
        request = EngineRequest(
            f"prefill of {num_blocks}",
            sequence.token_ids[: num_blocks * BLOCK_SIZE].copy(),
            ROOT,
            tuple(sequence.block_hashes[:num_blocks]),
            None,
            handoff_owner=sequence.request_id,
        )

        def on_progress(num_tokens: int, num_computed: int, done: bool) -> None:
            if done:
                is_done.set()

        self.prefill.engine.submit(request, Listener(on_progress=on_progress))
        assert is_done.wait(TIMEOUT_S)

    def announce(self, num_tokens: int, request_id: str = "r") -> None:
        self.decode.engine.handoff_progress(request_id, num_tokens, None)

    def close(self, request_id: str = "r") -> None:
        self.decode.engine.handoff_closed(request_id)


@contextmanager
def slow_prefill(model_dir: Path, store: NodeStore) -> Iterator[SlowPrefill]:
    with (
        running(make_engine(model_dir, store, replica_id="prefill")) as prefill,
        running(make_engine(model_dir, store, replica_id="decode")) as decode,
    ):
        yield SlowPrefill(prefill, decode)


def test_a_handoff_in_several_steps_is_loaded_as_it_is_announced(tiny_model_dir: Path, oracle: Oracle) -> None:
    prompt = prompt_of(BLOCK_SIZE * 8 + 5)
    with gated_store() as store, slow_prefill(tiny_model_dir, store) as handoff:
        decode = handoff.decode.engine
        pending = handoff.submit(prompt, SamplingParams(8, temperature=0.0))
        handoff.announce(0)
        for num_blocks in (2, 5):
            handoff.compute(num_blocks)
            handoff.announce(num_blocks * BLOCK_SIZE)
            wait_until(lambda n=num_blocks: decode.counters["loaded_tokens"] == n * BLOCK_SIZE)  # type: ignore[misc]
        handoff.announce(2 * BLOCK_SIZE)  # late and of no use
        assert decode.counters["computed_tokens"] == 0, "decode waits"
        handoff.close()
        handoff.close()
        answer = pending.wait()
        oracle.check(prompt, answer.token_ids, 8)
        assert answer.cost.prefill_tokens == 5 * BLOCK_SIZE
        assert answer.cost.decode_computed_tokens == 3 * BLOCK_SIZE + 5
        wait_until(lambda: store.stats().handoff_bytes == 0)


def test_what_is_announced_while_a_load_is_in_flight_and_closed_is_still_loaded_as_handed_off(
    tiny_model_dir: Path, oracle: Oracle
) -> None:
    prompt = prompt_of(BLOCK_SIZE * 8)
    with gated_store() as store, slow_prefill(tiny_model_dir, store) as handoff:
        pending = handoff.submit(prompt, SamplingParams(8, temperature=0.0))
        handoff.compute(7)
        store.loads.shut()
        handoff.announce(2 * BLOCK_SIZE)
        store.loads.wait_for_caller()
        handoff.announce(7 * BLOCK_SIZE)
        handoff.close()
        handoff.decode.engine.check_integrity()
        store.loads.open()
        answer = pending.wait()
        oracle.check(prompt, answer.token_ids, 8)
        assert answer.cost.prefill_tokens == 7 * BLOCK_SIZE
        assert answer.cost.cached_tokens == 0
        wait_until(lambda: store.stats().handoff_bytes == 0)


def test_an_announcement_of_more_than_there_is_leaves_the_last_token_to_decode(
    tiny_model_dir: Path, oracle: Oracle
) -> None:
    prompt = prompt_of(BLOCK_SIZE * 4)
    with gated_store() as store, slow_prefill(tiny_model_dir, store) as handoff:
        pending = handoff.submit(prompt, SamplingParams(4, temperature=0.0))
        handoff.compute(4)
        handoff.announce(10_000)
        handoff.close()
        answer = pending.wait()
        oracle.check(prompt, answer.token_ids, 4)
        assert answer.cost.decode_computed_tokens == 1


@pytest.mark.parametrize("is_load_in_flight", [False, True])
def test_cancel_while_a_handoff_is_open_lets_go_of_everything(tiny_model_dir: Path, is_load_in_flight: bool) -> None:
    with gated_store() as store, slow_prefill(tiny_model_dir, store) as handoff:
        handoff.submit(prompt_of(BLOCK_SIZE * 6), LONG)
        handoff.compute(3)
        assert store.stats().handoff_bytes > 0
        if is_load_in_flight:
            store.loads.shut()
            handoff.announce(3 * BLOCK_SIZE)
            store.loads.wait_for_caller()
        handoff.decode.engine.cancel("r")
        assert num_used(handoff.decode) == (6 if is_load_in_flight else 0)
        store.loads.open()
        wait_until(lambda: is_still(handoff.decode))
        wait_until(lambda: store.stats().handoff_bytes == 0)
        handoff.announce(3 * BLOCK_SIZE)
        handoff.close()
        handoff.decode.engine.check_integrity()


def test_a_handoff_that_is_closed_before_anything_came_is_computed_here(tiny_model_dir: Path, oracle: Oracle) -> None:
    prompt = prompt_of(BLOCK_SIZE * 4)
    with gated_store() as store, slow_prefill(tiny_model_dir, store) as handoff:
        pending = handoff.submit(prompt, SamplingParams(4, temperature=0.0))
        handoff.close()
        answer = pending.wait()
        oracle.check(prompt, answer.token_ids, 4)
        assert answer.cost.decode_computed_tokens == len(prompt)


def test_prefill_whose_store_refuses_says_so_and_ends(tiny_model_dir: Path, oracle: Oracle) -> None:
    prompt = prompt_of(BLOCK_SIZE * 8 + 1)
    with (
        gated_store(handoff_bytes=100) as store,
        running(make_engine(tiny_model_dir, store, replica_id="prefill")) as prefill,
        running(make_engine(tiny_model_dir, store, replica_id="decode")) as decode,
    ):
        handoff = Handoff(prefill, decode)
        answer = handoff.submit(prompt, SamplingParams(4, temperature=0.0), "refused").wait()
        oracle.check(prompt, answer.token_ids, 4)
        assert set(handoff.announced) == {(0, True)}, "chunks that were on their way are refused as well"
        assert answer.cost.decode_computed_tokens == len(prompt)
        wait_until(lambda: is_still(prefill))


def test_prefill_that_has_all_in_its_pool_hands_it_off_without_computing(tiny_model_dir: Path) -> None:
    prompt = prompt_of(BLOCK_SIZE * 4 + 1)
    with (
        open_store(None) as store,
        open_store(None) as other_store,
        running(make_engine(tiny_model_dir, store, replica_id="prefill")) as prefill,
        running(make_engine(tiny_model_dir, other_store, replica_id="decode")) as decode,
    ):
        prefill.greedy(prompt, 1)
        computed = prefill.engine.counters["computed_tokens"]
        handoff = Handoff(prefill, decode, sends_logits=False)
        handoff.submit(prompt, SamplingParams(2, temperature=0.0), "again").wait()
        assert handoff.announced == [(BLOCK_SIZE * 4, True)]
        assert prefill.engine.counters["computed_tokens"] == computed


def test_chunks_are_announced_while_the_step_loop_goes_on(tiny_model_dir: Path) -> None:
    threads = list[str]()
    with (
        open_store(None) as store,
        running(make_engine(tiny_model_dir, store, replica_id="prefill", step_tokens=BLOCK_SIZE)) as prefill,
        running(make_engine(tiny_model_dir, store, replica_id="decode")) as decode,
    ):
        handoff = Handoff(prefill, decode, on_announced=lambda: threads.append(threading.current_thread().name))
        handoff.submit(prompt_of(BLOCK_SIZE * 4 + 5), SamplingParams(2, temperature=0.0), "chunks").wait()
    assert [num_tokens for num_tokens, _ in handoff.announced] == [16, 32, 48, 64, 69]
    assert [is_last for _, is_last in handoff.announced] == [False] * 4 + [True]
    assert all(name.startswith("tokenloft-store") for name in threads)
    assert len(threads) == 5


def test_a_purge_ends_when_nothing_more_is_on_its_way_into_the_store(tiny_model_dir: Path) -> None:
    prompt = prompt_of(BLOCK_SIZE * 3 + 5)
    with gated_store() as store, running(make_engine(tiny_model_dir, store)) as engine:
        store.stores.shut()
        engine.submit(prompt, SamplingParams(1, temperature=0.0), origin=Origin("acme")).wait()
        store.stores.wait_for_caller()
        purged = engine.engine.purge(PurgeQuery("acme"))
        with pytest.raises(TimeoutError):
            purged.result(0.1)
        store.stores.open()
        assert purged.result(TIMEOUT_S) == -(-len(prompt) // BLOCK_SIZE)
        assert store.purge(PurgeQuery("acme")).num_tokens == len(prompt)
