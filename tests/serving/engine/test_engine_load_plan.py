"""Loading from the back while computing from the front, over a real engine and a store whose pace is the test's."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.hashing import as_token_ids, chain_hashes
from cache.messages import LoadGrant, LoadQuery
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.memory import MemoryTier
from serving.engine.engine import Engine
from serving.engine.planner import LoadMode
from serving.engine.runner import ModelRunner
from serving.engine.sequence import Listener, Sequence
from serving.protocol import SamplingParams
from tests.oracle import Oracle
from tests.serving.engine.harness import ROOT, Handoff, Pending, prompt_of, running
from tests.serving.engine.paced import TIMEOUT_S, Pace, bench, engine_of


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.002)


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(num_tokens, temperature=0.0)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("num_brought", [0, 1, 4, 11, 1000])
@pytest.mark.parametrize("tail", [0, 7])
def test_front_and_back_meet_anywhere(
    tiny_model_dir: Path, oracle: Oracle, block_size: int, num_brought: int, tail: int
) -> None:
    history = prompt_of(block_size * 12 + tail)
    prompt = history + prompt_of(9, seed=1)
    with bench(tiny_model_dir, [history], block_size=block_size) as b:
        b.pace.allow(num_brought)
        answer = b.engine.greedy(prompt, 6)
        oracle.check(prompt, answer.token_ids, 6)
        loaded, computed = b.check_conserved(answer)
        assert loaded <= num_brought * block_size
        assert computed >= len(prompt) - len(history)
        plan = answer.cost.plan
        assert plan is not None
        assert plan.kind == "both"
        assert plan.load_tokens + plan.compute_tokens == len(history)
        assert b.counters()["plans_to_both"] == 1
        if num_brought == 0:
            assert computed == len(prompt)


@pytest.mark.parametrize("seed", range(6))
def test_any_interleaving_of_load_and_steps(tiny_model_dir: Path, oracle: Oracle, seed: int) -> None:
    rng = random.Random(seed)
    history = prompt_of(16 * 14 + rng.randrange(16), seed=seed)
    with bench(tiny_model_dir, [history]) as b:
        b.runner.may_step = threading.Semaphore(0)
        pending = b.engine.submit([*history, 5, 6, 7], greedy(4))
        for _ in range(40):
            rng.choice([b.pace.permits, b.runner.may_step]).release()
            time.sleep(rng.choice([0.0, 0.001, 0.01]))
        b.pace.is_free.set()
        b.runner.may_step.release(1000)
        answer = pending.wait()
        oracle.check([*history, 5, 6, 7], answer.token_ids, 4)
        b.check_conserved(answer)


def test_both_ends_really_help(tiny_model_dir: Path) -> None:
    history = prompt_of(16 * 40)
    with bench(tiny_model_dir, [history]) as b:
        b.pace.is_free.set()
        answer = b.engine.greedy(history, 1)
        loaded, computed = b.check_conserved(answer)
        assert loaded >= 64
        assert computed >= 32
        assert b.pace.brought[0] == 39, "the load begins at the end"


def test_a_load_that_is_late_is_helped_from_the_front(tiny_model_dir: Path, oracle: Oracle) -> None:
    history = prompt_of(16 * 12)
    with bench(tiny_model_dir, [history], knows_speeds=False) as b:
        b.pace.permits.release(1)
        pending = b.engine.submit(history, greedy(4))
        wait_until(lambda: b.counters().get("computed_prompt_tokens", 0) > 0)
        b.pace.permits.release(1)
        answer = pending.wait()
        oracle.check(history, answer.token_ids, 4)
        assert answer.cost.plan is not None
        assert answer.cost.plan.kind == "load", "as it was assumed that memory is fast"
        b.check_conserved(answer)


@pytest.mark.parametrize("bad_block", [0, 5, 11, 12])
@pytest.mark.parametrize("is_gone", [False, True], ids=["damaged", "gone"])
def test_a_bad_block_costs_itself_and_never_the_answer(
    tiny_model_dir: Path, oracle: Oracle, bad_block: int, is_gone: bool
) -> None:
    history = prompt_of(16 * 12 + 5)
    prompt = [*history, 9, 9]
    with bench(tiny_model_dir, [history]) as b:
        b.runner.may_step = threading.Semaphore(0)  # the load comes as far as it can
        if is_gone:
            b.pace.lose = lambda block: block == bad_block
        else:
            b.pace.spoil = lambda block: block == bad_block
        b.pace.is_free.set()
        pending = b.engine.submit(prompt, greedy(4))
        time.sleep(0.2)
        b.runner.may_step.release(1000)
        answer = pending.wait()
        oracle.check(prompt, answer.token_ids, 4)
        loaded, _ = b.check_conserved(answer)
        if 0 < bad_block < 12:
            assert loaded >= (12 - bad_block - 1) * 16 + 5, "what is behind it counts"
        if bad_block:  # the first one may have been computed already
            assert b.store.stats().counters.get("quarantined_extents", 0) == (0 if is_gone else 1)


def test_after_a_bad_block_the_load_goes_on_before_it(tiny_model_dir: Path, oracle: Oracle) -> None:
    history = prompt_of(16 * 12 + 5)
    with bench(tiny_model_dir, [history]) as b:
        b.runner.may_step = threading.Semaphore(0)
        b.pace.spoil = lambda block: block == 12
        b.pace.is_free.set()
        pending = b.engine.submit([*history, 9], greedy(4))
        wait_until(lambda: 11 in b.pace.brought and 6 in b.pace.brought)
        b.runner.may_step.release(1000)
        answer = pending.wait()
        oracle.check([*history, 9], answer.token_ids, 4)
        loaded, _ = b.check_conserved(answer)
        assert loaded >= 16 * 5


def test_a_store_that_goes_in_the_middle_is_a_slow_answer(tiny_model_dir: Path, oracle: Oracle) -> None:
    history = prompt_of(16 * 12)
    with bench(tiny_model_dir, [history]) as b:
        b.pace.lose = lambda block: block < 9
        b.pace.is_free.set()
        answer = b.engine.greedy([*history, 3], 4)
        oracle.check([*history, 3], answer.token_ids, 4)
        loaded, computed = b.check_conserved(answer)
        assert loaded <= 3 * 16
        assert computed >= 9 * 16


@pytest.mark.parametrize("has_computed", [False, True])
def test_cancel_frees_the_blocks_when_the_load_lets_go_of_them(tiny_model_dir: Path, has_computed: bool) -> None:
    history = prompt_of(16 * 12)
    with bench(tiny_model_dir, [history]) as b:
        stats = b.engine.engine.stats
        if not has_computed:
            b.runner.may_step = threading.Semaphore(0)
        b.pace.permits.release(2)
        b.engine.submit(history + prompt_of(300, seed=3), greedy(4), request_id="r")
        wait_until(lambda: len(b.pace.brought) == 2)
        if has_computed:
            wait_until(lambda: b.engine.engine.counters["computed_tokens"] > 0)
        b.engine.engine.cancel("r")
        if b.runner.may_step is not None:
            b.runner.may_step.release(1000)
        b.engine.engine.check_integrity()
        b.pace.is_free.set()
        wait_until(lambda: stats()["num_used_blocks"] == stats()["num_admitted"] == 0)
        assert b.engine.greedy(history, 2).cost.prompt_tokens == len(history)


def test_others_decode_while_one_loads(tiny_model_dir: Path, oracle: Oracle) -> None:
    history = prompt_of(16 * 12)
    with bench(tiny_model_dir, [history], plan="load") as b:
        loading = b.engine.submit(history, greedy(4))
        other = prompt_of(40, seed=7)
        pending = b.engine.submit(other, greedy(20), use_cache=False)
        oracle.check(other, pending.wait().token_ids, 20)
        assert loading.batches.empty()
        b.pace.is_free.set()
        oracle.check(history, loading.wait().token_ids, 4)


@pytest.mark.parametrize("plan", ["load", "auto"])
def test_preemption_beside_a_load(tiny_model_dir: Path, oracle: Oracle, plan: LoadMode) -> None:
    history = prompt_of(16 * 8)
    params = SamplingParams(90, temperature=0.0, ignore_eos=True)
    with bench(tiny_model_dir, [history], num_blocks=22, plan=plan) as b:
        others = [prompt_of(30, seed=20 + i) for i in range(3)]
        decoding = [b.engine.submit(other, params) for other in others]
        for one in decoding:
            one.first()
        loading = b.engine.submit(history, greedy(20))
        b.pace.allow(3)
        wait_until(lambda: b.engine.engine.stats()["preemptions"] >= 1)
        b.pace.is_free.set()
        oracle.check(history, loading.wait().token_ids, 20)
        for other, one in zip(others, decoding, strict=True):
            rest = one.wait().token_ids
            assert len(rest) == 89
            expected = oracle.generate(other, 90)
            oracle.check([*other, expected[0]], rest[: len(expected) - 1], len(expected) - 1)


@pytest.mark.parametrize(("plan", "loaded_blocks"), [("load", 12), ("compute", 0)])
def test_one_way_alone(tiny_model_dir: Path, oracle: Oracle, plan: LoadMode, loaded_blocks: int) -> None:
    history = prompt_of(16 * 12 + 3)
    with bench(tiny_model_dir, [history], plan=plan, knows_speeds=False) as b:
        b.pace.is_free.set()
        answer = b.engine.greedy([*history, 8], 5)
        oracle.check([*history, 8], answer.token_ids, 5)
        loaded, _ = b.check_conserved(answer)
        assert loaded == (len(history) if loaded_blocks else 0)
        kind = answer.cost.plan.kind if answer.cost.plan is not None else None
        assert kind == ("load" if loaded_blocks else None)


def test_a_match_in_the_pool_that_ends_inside_a_block(tiny_model_dir: Path, oracle: Oracle) -> None:
    history = prompt_of(16 * 12)
    with bench(tiny_model_dir, [history]) as b:
        b.engine.greedy(history[: 16 * 2 + 5], 1, use_cache=True)
        b.engine.engine.reset_counters()
        for permits in (0, 3):
            b.pace.allow(permits)
            answer = b.engine.greedy([*history, permits], 4)
            oracle.check([*history, permits], answer.token_ids, 4)
            if permits == 0:
                assert answer.cost.device_tokens >= 16 * 2
                b.check_conserved(answer)


def test_decode_asks_prefill_for_the_rest_only_when_the_two_have_met(tiny_model_dir: Path, oracle: Oracle) -> None:
    history = prompt_of(16 * 10)
    prompt = history + prompt_of(16 * 6, seed=4)
    with bench(tiny_model_dir, [history]) as b:
        asked_at: list[int] = []
        pending = Pending()

        def ask(sequence: Sequence) -> bool:
            asked_at.append(sequence.num_computed)
            return False

        b.pace.permits.release(2)
        b.engine.submit(prompt, greedy(4), listener=Listener(on_batch=pending.batches.put, ask_prefill=ask))
        answer = pending.wait()
        oracle.check(prompt, answer.token_ids, 4)
        assert asked_at == [len(history)]
        b.check_conserved(answer)


def test_a_long_gap_that_the_store_leaves_is_for_prefill(tiny_model_dir: Path, oracle: Oracle) -> None:
    history = prompt_of(16 * 12)
    with bench(tiny_model_dir, [history]) as b:
        b.runner.may_step = threading.Semaphore(0)
        b.pace.lose = lambda block: block < 10
        b.pace.is_free.set()
        prefill_runner = ModelRunner(tiny_model_dir)
        prefill = engine_of(prefill_runner, b.store, Pace(), 16, "compute", 128, "prefill")
        with running(prefill) as prefill_engine:
            handoff = Handoff(prefill_engine, b.engine)
            pending = handoff.submit([*history, 4], greedy(4), "r")
            b.runner.may_step.release(1000)
            b.pace.lose = lambda block: False
            answer = pending.wait()
        oracle.check([*history, 4], answer.token_ids, 4)
        cost = answer.cost
        assert cost.cached_tokens + cost.prefill_tokens + cost.decode_computed_tokens == cost.prompt_tokens


def test_prefill_itself_loads_and_computes_at_once(tiny_model_dir: Path, oracle: Oracle) -> None:
    history = prompt_of(16 * 12)
    prompt = history + prompt_of(16 * 4, seed=6)
    with bench(tiny_model_dir, [history]) as b:
        b.pace.permits.release(3)
        free = Pace()
        free.is_free.set()
        decode = engine_of(ModelRunner(tiny_model_dir), b.store, free, 16, "compute", 128, "decode")
        with running(decode) as decode_engine:
            answer = Handoff(b.engine, decode_engine).submit(prompt, greedy(4), "r").wait()
        oracle.check(prompt, answer.token_ids, 4)
        counters = b.counters()
        num_handed_off = len(prompt)
        assert counters["loaded_tokens"] + counters["computed_prompt_tokens"] == num_handed_off
        assert answer.cost.prefill_tokens == num_handed_off


class SilentStore(NodeStore):
    """A node store that does not answer a lookup until it is told to."""

    may_answer = threading.Event()

    def prepare_load(self, query: LoadQuery) -> LoadGrant:
        assert self.may_answer.wait(TIMEOUT_S)
        return super().prepare_load(query)


def test_a_store_that_does_not_answer_is_not_waited_for(tiny_model_dir: Path, oracle: Oracle) -> None:
    prompt = prompt_of(16 * 8)
    budgets = Budgets(64 << 20, 0, 64 << 20)
    store = SilentStore(NodeStoreConfig(budgets, store_wait_s=0.0), MemoryTier(), None)
    with store:
        engine = engine_of(ModelRunner(tiny_model_dir), store, Pace(), 16, "auto", 64, "engine")
        with running(engine) as under_test:
            answer = under_test.greedy(prompt, 4)
            oracle.check(prompt, answer.token_ids, 4)
            assert answer.cost.decode_computed_tokens == len(prompt)
            store.may_answer.set()


def test_kv_of_both_sides_is_the_oracles(tiny_model_dir: Path) -> None:
    """What lies in the pool after a meeting is what one engine alone computes, to rounding."""
    history = prompt_of(16 * 12)
    with bench(tiny_model_dir, [history]) as b:
        b.pace.permits.release(5)
        b.engine.greedy([*history, 3, 4], 2)
        met = _kv_of(b.engine.engine, history)
    with bench(tiny_model_dir, [], plan="compute") as b:
        b.engine.greedy([*history, 3, 4], 2)
        alone = _kv_of(b.engine.engine, history)
    assert np.allclose(met, alone, atol=1e-4)


def _kv_of(engine: Engine, history: list[int]) -> Any:
    engine.check_integrity()
    ids = as_token_ids(history)
    match = engine._scheduler.pool.match(ROOT, chain_hashes(ROOT, ids, 16), ids)
    assert len(match.block_ids) == len(history) // 16
    slots = [block * 16 + row for block in match.block_ids for row in range(16)]
    return engine._kv.kv[:, :, slots].numpy()
