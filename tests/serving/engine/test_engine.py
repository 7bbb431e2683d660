"""The engine over a tiny random model: parity with the oracle, reuse counted by the engine itself."""

import threading
import time
from pathlib import Path

import pytest

from cache.events import Tier
from cache.fingerprint import Fingerprint
from cache.hashing import as_token_ids, chain_hashes
from serving.engine.engine import EngineStopped, RequestTooLong
from serving.engine.sequence import EngineRequest, Listener, Sequence
from serving.protocol import SamplingParams, TokenBatch
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
from tests.tiny_models import FAMILIES, build_tiny_model

GREEDY = 0.0


def test_greedy_equals_the_oracle_in_chunks(tiny_model_dir: Path, oracle: Oracle) -> None:
    for step_tokens in (5, 64, 256):
        with running(make_engine(tiny_model_dir, step_tokens=step_tokens)) as engine:
            prompt = prompt_of(150)
            answer = engine.greedy(prompt, 20)
            oracle.check(prompt, answer.token_ids, 20)
            assert answer.cost.decode_computed_tokens == 150
            assert answer.cost.cached_tokens == 0


def test_a_batch_gives_what_each_sequence_gives_alone(tiny_model_dir: Path, oracle: Oracle) -> None:
    with running(make_engine(tiny_model_dir, num_blocks=128)) as engine:
        prompts = [prompt_of(10 + 17 * i, seed=i) for i in range(8)]
        pending = [engine.submit(p, SamplingParams(12, temperature=GREEDY)) for p in prompts]
        for prompt, request in zip(prompts, pending, strict=True):
            oracle.check(prompt, request.wait().token_ids, 12)


def test_second_turn_reuses_all_but_the_last_token_of_the_pool(tiny_model_dir: Path, oracle: Oracle) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        prompt = prompt_of(100)
        first = engine.greedy(prompt, 15)
        history = prompt + first.token_ids
        before = engine.engine.counters["computed_tokens"]
        second_prompt = history + prompt_of(9, seed=5)
        second = engine.greedy(second_prompt, 10)
        oracle.check(second_prompt, second.token_ids, 10)
        assert second.cost.device_tokens >= len(history) - 1
        computed = engine.engine.counters["computed_tokens"] - before
        assert computed <= len(second_prompt) - (len(history) - 1) + len(second.token_ids) - 1


def test_a_prompt_again_computes_one_token(tiny_model_dir: Path, oracle: Oracle) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        for num_tokens in (BLOCK_SIZE * 4, BLOCK_SIZE * 4 + 1, BLOCK_SIZE * 4 - 1):
            prompt = prompt_of(num_tokens, seed=num_tokens)
            engine.greedy(prompt, 4)
            again = engine.greedy(prompt, 4)
            assert again.cost.device_tokens == num_tokens - 1
            assert again.cost.decode_computed_tokens == 1
            oracle.check(prompt, again.token_ids, 4)


def test_two_prompts_that_fork_inside_a_block_share_up_to_the_fork(tiny_model_dir: Path, oracle: Oracle) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        common = prompt_of(BLOCK_SIZE * 3 + 7)
        left, right = common + prompt_of(40, seed=1), common + prompt_of(40, seed=2)
        engine.greedy(left, 4)
        answer = engine.greedy(right, 8)
        assert answer.cost.device_tokens == len(common)
        oracle.check(right, answer.token_ids, 8)
        oracle.check(left, engine.greedy(left, 8).token_ids, 8)


def test_cache_off_reuses_nothing(tiny_model_dir: Path, oracle: Oracle) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        prompt = prompt_of(60)
        for _ in range(2):
            answer = engine.greedy(prompt, 6, use_cache=False)
            assert answer.cost.cached_tokens == 0
            assert answer.cost.decode_computed_tokens == 60
            oracle.check(prompt, answer.token_ids, 6)


@pytest.mark.parametrize("dram_bytes", [64 << 20, 256 << 10], ids=["dram", "disk"])
def test_another_engine_loads_the_turn_from_the_store(
    tiny_model_dir: Path, oracle: Oracle, tmp_path: Path, dram_bytes: int
) -> None:
    prompt = prompt_of(BLOCK_SIZE * 20 + 5)
    with open_store(tmp_path, dram_bytes=dram_bytes) as store:
        with running(make_engine(tiny_model_dir, store, replica_id="a")) as engine:
            first = engine.greedy(prompt, 20)
        assert store.flush()
        history = prompt + first.token_ids
        with running(make_engine(tiny_model_dir, store, replica_id="b")) as engine:
            second_prompt = [*history, 7, 8, 9]
            second = engine.greedy(second_prompt, 10)
            oracle.check(second_prompt, second.token_ids, 10)
            assert second.cost.device_tokens == 0
            assert second.cost.dram_tokens + second.cost.disk_tokens >= len(history) - 1
            assert engine.engine.counters["computed_prompt_tokens"] <= 4
        store.check_integrity()


def test_a_turn_after_a_restart_comes_from_disk(tiny_model_dir: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompt = prompt_of(200)
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store)) as engine:
        first = engine.greedy(prompt, 10)
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store)) as engine:
        second_prompt = [*prompt, *first.token_ids, 11, 12]
        second = engine.greedy(second_prompt, 10)
        oracle.check(second_prompt, second.token_ids, 10)
        assert second.cost.disk_tokens >= len(prompt) + len(first.token_ids) - 1


def test_a_damaged_extent_is_recomputed(tiny_model_dir: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompt = prompt_of(200)
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store)) as engine:
        engine.greedy(prompt, 4)
    for path in tmp_path.glob("extents/*/*/*.kv"):
        data = bytearray(path.read_bytes())
        data[-100] ^= 0x55
        path.write_bytes(data)
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store)) as engine:
        answer = engine.greedy(prompt, 10)
        oracle.check(prompt, answer.token_ids, 10)
        assert store.stats().counters["quarantined_extents"] >= 1


def test_a_full_pool_preempts_and_every_answer_is_still_right(tiny_model_dir: Path, oracle: Oracle) -> None:
    # Four sequences of 160 tokens at their end want 40 blocks; the pool has 24.
    with running(make_engine(tiny_model_dir, num_blocks=24)) as engine:
        prompts = [prompt_of(60, seed=i) for i in range(4)]
        pending = [engine.submit(p, SamplingParams(100, temperature=GREEDY)) for p in prompts]
        for prompt, request in zip(prompts, pending, strict=True):
            oracle.check(prompt, request.wait().token_ids, 100)


def test_a_request_that_can_never_fit_is_refused(tiny_model_dir: Path) -> None:
    with running(make_engine(tiny_model_dir, num_blocks=4)) as engine, pytest.raises(RequestTooLong, match="64"):
        engine.submit(prompt_of(60), SamplingParams(5))


def test_cancel_stops_within_a_step_and_frees_the_blocks(tiny_model_dir: Path) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        request = engine.submit(prompt_of(50), SamplingParams(900, temperature=1.0, seed=1), request_id="long")
        request.first()
        engine.engine.cancel("long")
        engine.engine.check_integrity()  # runs behind the cancel in the same inbox
        steps = engine.engine.counters["steps"]
        time.sleep(0.2)
        assert engine.engine.counters["steps"] == steps
        assert engine.engine.stats()["num_used_blocks"] == 0
        engine.engine.cancel("unknown")


def test_sampling_depends_on_seed_alone(tiny_model_dir: Path) -> None:
    params = SamplingParams(20, temperature=1.0, top_p=0.9, seed=42)
    with running(make_engine(tiny_model_dir, num_blocks=128)) as engine:
        alone = engine.submit(prompt_of(30), params).wait()
        crowd = [engine.submit(prompt_of(30, seed=i), SamplingParams(20, seed=i)) for i in range(1, 6)]
        in_crowd = engine.submit(prompt_of(30), params)
        assert in_crowd.wait().token_ids == alone.token_ids
        other = engine.submit(prompt_of(30), SamplingParams(20, temperature=1.0, top_p=0.9, seed=43)).wait()
        assert other.token_ids != alone.token_ids
        for request in crowd:
            request.wait()


def test_a_stop_string_ends_the_answer(tiny_model_dir: Path) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        whole = engine.greedy(prompt_of(30), 30)
        assert len(whole.text) > 8
        stop = whole.text[4:7]
        params = SamplingParams(30, temperature=GREEDY, stop=(stop,))
        stopped = engine.submit(prompt_of(30), params).wait()
        assert stopped.finish_reason == "stop"
        assert stopped.text == whole.text[: whole.text.index(stop)]
        assert len(stopped.token_ids) < len(whole.token_ids)


def test_a_store_that_is_gone_costs_time_only(tiny_model_dir: Path, oracle: Oracle, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with running(make_engine(tiny_model_dir, store)) as engine:
        store.close()
        prompt = prompt_of(80)
        oracle.check(prompt, engine.greedy(prompt, 8).token_ids, 8)


def test_prefill_hands_its_blocks_to_another_engine(tiny_model_dir: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompt = prompt_of(BLOCK_SIZE * 12 + 3)
    with (
        open_store(tmp_path) as store,
        running(make_engine(tiny_model_dir, store, replica_id="prefill")) as prefill,
        running(make_engine(tiny_model_dir, store, replica_id="decode")) as decode,
    ):
        handoff = Handoff(prefill, decode)
        for use_cache in (False, True):
            computed = prefill.engine.counters["computed_tokens"] + decode.engine.counters["computed_tokens"]
            # Without the cache each request has a root that nobody else has.
            root = ROOT if use_cache else Fingerprint("a", "b", "c", "d", 16, tenant_salt="once").root_hash()
            params = SamplingParams(10, temperature=GREEDY)
            request_id = f"handoff-{use_cache}"
            answer = handoff.submit(prompt, params, request_id, root=root, use_cache=use_cache).wait()
            oracle.check(prompt, answer.token_ids, 10)
            # The tail too: with the last token's logits, decode has nothing of the prompt to compute.
            assert answer.cost.prefill_tokens == len(prompt)
            assert answer.cost.decode_computed_tokens == 0
            after = prefill.engine.counters["computed_tokens"] + decode.engine.counters["computed_tokens"]
            # Every token of the prompt was computed once, on one side or the other.
            assert after - computed == len(prompt) + len(answer.token_ids) - 1
        # What is kept is decode's turn: a tail of prefill's is not.
        num_blocks = -(-(len(prompt) + 10 - 1) // BLOCK_SIZE)
        deadline = time.monotonic() + 30.0
        while store.stats().handoff_bytes or store.stats().num_blocks != num_blocks:
            assert time.monotonic() < deadline, store.stats()
            time.sleep(0.01)
        assert store.flush()
        store.check_integrity()


def test_a_handoff_that_breaks_off_is_finished_here(tiny_model_dir: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompt = prompt_of(BLOCK_SIZE * 6)
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store)) as engine:

        def ask(sequence: object) -> bool:
            threading.Timer(0.1, lambda: engine.engine.handoff_closed("broken")).start()
            return True

        pending = engine.submit(prompt, SamplingParams(1, temperature=GREEDY))
        pending.wait()
        other = prompt_of(BLOCK_SIZE * 6, seed=3)
        broken = Pending()
        engine.submit(
            other,
            SamplingParams(8, temperature=GREEDY),
            listener=Listener(on_batch=broken.batches.put, ask_prefill=ask),
            request_id="broken",
        )
        answer = broken.wait()
        oracle.check(other, answer.token_ids, 8)
        assert answer.cost.decode_computed_tokens == len(other)


def test_usage_adds_up_for_a_sequence_that_was_preempted(tiny_model_dir: Path, tmp_path: Path) -> None:
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store, num_blocks=16)) as engine:
        for use_cache in (True, False):
            params = SamplingParams(100, temperature=GREEDY)
            pending = [engine.submit(prompt_of(60, seed=i), params, use_cache=use_cache) for i in range(3)]
            for request in pending:
                usage = request.wait().cost
                known = usage.cached_tokens + usage.prefill_tokens + usage.decode_computed_tokens
                assert known == usage.prompt_tokens
        computed = engine.engine.counters["computed_prompt_tokens"]
        assert computed > 6 * 60, "the engine's own counter tells what was computed twice"


def test_one_token_and_a_whole_pool(tiny_model_dir: Path, oracle: Oracle) -> None:
    with running(make_engine(tiny_model_dir, num_blocks=4)) as engine:
        for num_tokens in (1, 4 * BLOCK_SIZE - 1):
            prompt = prompt_of(num_tokens)
            for _ in range(2):
                answer = engine.greedy(prompt, 1)
                assert answer.finish_reason == "length"
                oracle.check(prompt, answer.token_ids, 1)
        # Shares only the beginning of a cached block, and needs the whole pool.
        forked = [*prompt[:7], *prompt_of(4 * BLOCK_SIZE - 8, seed=9)]
        oracle.check(forked, engine.greedy(forked, 1).token_ids, 1)


def prefill_request(num_tokens: int, *, owner: str | None = "owner", first_block: int = 0) -> EngineRequest:
    ids = as_token_ids(prompt_of(num_tokens))
    hashes = tuple(chain_hashes(ROOT, ids, BLOCK_SIZE))
    return EngineRequest("prefill", ids, ROOT, hashes, None, handoff_owner=owner, handoff_first_block=first_block)


def test_a_request_that_could_never_end_is_refused(tiny_model_dir: Path) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        with pytest.raises(ValueError, match="no tokens"):
            engine.submit([], SamplingParams(5))
        with pytest.raises(ValueError, match="max_tokens=0"):
            engine.submit(prompt_of(5), SamplingParams(0))
        for request in (
            prefill_request(BLOCK_SIZE, owner=None),
            prefill_request(BLOCK_SIZE, first_block=1),
        ):
            with pytest.raises(ValueError, match="hand"):
                engine.engine.submit(request, Listener())


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(tiny_model_dir: Path, oracle: Oracle) -> None:
    with running(make_engine(tiny_model_dir)) as engine:
        prompt, params = prompt_of(30), SamplingParams(40, temperature=GREEDY)
        first = engine.submit(prompt, params, request_id="same")
        second = engine.submit(prompt_of(30, seed=1), params, request_id="same").wait()
        assert (second.finish_reason, second.text) == ("error", "request id same is in use")
        oracle.check(prompt, first.wait().token_ids, 40)
        assert engine.submit(prompt, params, request_id="same").wait().finish_reason == "length"


def test_a_listener_that_raises_loses_its_request_alone(tiny_model_dir: Path, oracle: Oracle) -> None:
    def refuse(_: TokenBatch) -> None:
        raise ConnectionError("nobody listens")

    def cannot_ask(_: Sequence) -> bool:
        raise RuntimeError("the loop is closed")

    with running(make_engine(tiny_model_dir)) as engine:
        prompt = prompt_of(30)
        other = engine.submit(prompt, SamplingParams(30, temperature=GREEDY))
        engine.submit(prompt_of(40), SamplingParams(500), listener=Listener(on_batch=refuse))
        engine.submit(prompt_of(40, seed=1), SamplingParams(500), listener=Listener(ask_prefill=cannot_ask))
        oracle.check(prompt, other.wait().token_ids, 30)
        engine.engine.check_integrity()
        assert engine.engine.counters["cancelled"] == 2
        assert engine.engine.stats()["num_used_blocks"] == 0


def test_stopping_answers_everybody_and_refuses_newcomers(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, max_running=1)
    engine.start()
    under_test = EngineUnderTest(engine)
    running_request = under_test.submit(prompt_of(30), SamplingParams(900, temperature=1.0))
    waiting_request = under_test.submit(prompt_of(30), SamplingParams(900, temperature=1.0))
    running_request.first()
    engine.check_alive()
    engine.stop()
    for request in (running_request, waiting_request):
        answer = request.wait()
        assert answer.finish_reason == "lost"
        assert answer.text.endswith("the engine is shutting down"), "behind whatever it had said before"
    with pytest.raises(EngineStopped):
        under_test.greedy(prompt_of(3), 1)
    with pytest.raises(EngineStopped):
        engine.check_alive()
    engine.cancel("unknown")


def test_a_fault_in_the_step_loop_ends_the_engine_and_answers_everybody(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir)
    engine.start()
    under_test = EngineUnderTest(engine)
    request = under_test.submit(prompt_of(30), SamplingParams(900, temperature=1.0), request_id="victim")
    request.first()

    def lose_blocks(sequence: Sequence) -> None:
        raise KeyError("a fault of ours")

    engine._on_sequence("victim", lose_blocks)
    assert request.wait().finish_reason == "lost"
    with pytest.raises(EngineStopped):
        engine.check_alive()
    engine.stop()


def test_device_reuse_is_reported_by_tier(tiny_model_dir: Path, tmp_path: Path) -> None:
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store)) as engine:
        prompt = prompt_of(100)
        engine.greedy(prompt, 4)
        usage = engine.greedy(prompt, 4).cost
        tiers = usage.device_tokens, usage.dram_tokens, usage.disk_tokens, usage.remote_tokens
        assert sum(tiers) + usage.prefill_tokens + usage.decode_computed_tokens == usage.prompt_tokens
        assert Tier.DEVICE.value == "device"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family_reuses_its_turns_and_answers_as_the_oracle(family: str, tmp_path: Path) -> None:
    model_dir = build_tiny_model(tmp_path / family, family=family, seed=1)
    oracle = Oracle(model_dir)
    with open_store(tmp_path / "store") as store:
        with running(make_engine(model_dir, store, replica_id="a")) as engine:
            prompt = prompt_of(100)
            first = engine.greedy(prompt, 12)
            oracle.check(prompt, first.token_ids, 12)
            second_prompt = [*prompt, *first.token_ids, *prompt_of(7, seed=9)]
            second = engine.greedy(second_prompt, 12)
            oracle.check(second_prompt, second.token_ids, 12)
            assert second.cost.device_tokens >= len(prompt) + len(first.token_ids) - 1
        assert store.flush()
        with running(make_engine(model_dir, store, replica_id="b")) as engine:
            again = engine.greedy(second_prompt, 12)
            assert again.token_ids == second.token_ids
            assert again.cost.dram_tokens >= len(second_prompt) - 1
