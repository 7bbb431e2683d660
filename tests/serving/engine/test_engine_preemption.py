"""Sequences that lose their blocks, are forked, or come from another engine: nothing is computed twice."""

import threading
import time
from pathlib import Path

from serving.protocol import SamplingParams
from tests.oracle import Oracle
from tests.serving.engine.harness import (
    BLOCK_SIZE,
    Answer,
    EngineUnderTest,
    make_engine,
    open_store,
    prompt_of,
    running,
)


def four_long_answers(engine: EngineUnderTest, oracle: Oracle, num_tokens: int) -> tuple[list[list[int]], list[Answer]]:
    prompts = [prompt_of(60, seed=i) for i in range(4)]
    pending = [engine.submit(p, SamplingParams(num_tokens, temperature=0.0)) for p in prompts]
    answers = [request.wait() for request in pending]
    for prompt, answer in zip(prompts, answers, strict=True):
        oracle.check(prompt, answer.token_ids, num_tokens)
    return prompts, answers


def test_a_preempted_sequence_comes_back_from_the_warehouse(
    tiny_model_dir: Path, oracle: Oracle, tmp_path: Path
) -> None:
    # Four sequences of 160 tokens at their end want 40 blocks; the pool has 20.
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store, num_blocks=20)) as engine:
        prompts, answers = four_long_answers(engine, oracle, 100)
        assert engine.engine.stats()["preemptions"] >= 1
        needed = sum(len(p) + len(a.token_ids) - 1 for p, a in zip(prompts, answers, strict=True))
        assert engine.engine.counters["computed_tokens"] == needed, "a preempted token was computed again"
        store.check_integrity()


def test_without_a_warehouse_a_preempted_sequence_is_recomputed(tiny_model_dir: Path, oracle: Oracle) -> None:
    with running(make_engine(tiny_model_dir, num_blocks=20)) as engine:
        four_long_answers(engine, oracle, 100)
        assert engine.engine.stats()["preemptions"] >= 1


def test_a_cancel_while_blocks_are_offloaded_gives_them_back_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    with open_store(tmp_path) as store, running(make_engine(tiny_model_dir, store, num_blocks=20)) as engine:
        for round_ in range(5):
            before = engine.engine.stats()["preemptions"]
            ids = [f"{round_}-{i}" for i in range(4)]
            for i, request_id in enumerate(ids):
                params = SamplingParams(100, seed=i, ignore_eos=True)
                engine.submit(prompt_of(60, seed=i), params, request_id=request_id)
            deadline = time.monotonic() + 10.0
            while engine.engine.stats()["preemptions"] == before and time.monotonic() < deadline:
                time.sleep(0.001)
            assert engine.engine.stats()["preemptions"] > before
            for request_id in ids:
                engine.engine.cancel(request_id)
            engine.engine.check_integrity()
        # The engine's own stores first: the node store knows nothing yet of those that still wait.
        stores_ended = threading.Event()
        assert engine.engine._loader is not None
        engine.engine._loader.after_stores(stores_ended.set)
        assert stores_ended.wait(30.0)
        assert store.flush()
        engine.engine.check_integrity()
        assert engine.engine.stats()["num_used_blocks"] == 0


def test_choices_share_the_prompts_blocks_with_the_cache_on_and_off(tiny_model_dir: Path, tmp_path: Path) -> None:
    prompt = prompt_of(BLOCK_SIZE * 6 + 5)
    for use_cache in (True, False):
        with open_store(tmp_path / str(use_cache)) as store, running(make_engine(tiny_model_dir, store)) as engine:
            answers = [
                engine.submit(
                    prompt, SamplingParams(10, temperature=1.0, seed=i), use_cache=use_cache, num_choices=3
                ).wait()
                for i in range(3)
            ]
            assert len({tuple(a.token_ids) for a in answers}) > 1
            computed = engine.engine.counters["computed_prompt_tokens"]
            assert computed <= len(prompt) + 2 * BLOCK_SIZE
            assert store.flush()
            assert bool(store.stats().num_blocks) is use_cache


def test_an_answer_goes_on_behind_what_another_engine_has_sent(tiny_model_dir: Path, oracle: Oracle) -> None:
    prompt = prompt_of(90)
    params = SamplingParams(40, temperature=0.8, top_p=0.95, seed=7)
    with running(make_engine(tiny_model_dir)) as engine:
        whole = engine.submit(prompt, params).wait()
    for num_sent in (1, 7, len(whole.token_ids) - 1):
        with running(make_engine(tiny_model_dir)) as engine:
            sent = tuple(whole.token_ids[:num_sent])
            rest = engine.submit(prompt, params, generated=sent).wait()
            assert [*sent, *rest.token_ids] == whole.token_ids
            assert whole.text.endswith(rest.text)
            assert rest.cost.completion_tokens == len(whole.token_ids)
            assert rest.finish_reason == whole.finish_reason
