"""Decode with smaller weights than prefill reads prefill's KV, and nobody ever finds what it has computed itself."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cache.hashing import BlockHash, as_token_ids
from cache.node_store import NodeStore
from serving.engine.linear import Weights
from serving.engine.runner import ModelRunner
from serving.engine.sequence import EngineRequest, Listener
from serving.protocol import SamplingParams
from tests.oracle import Oracle
from tests.serving.engine.harness import (
    BLOCK_SIZE,
    ROOT,
    Answer,
    EngineUnderTest,
    Handoff,
    make_engine,
    open_store,
    prompt_of,
    running,
)

PROMPT = prompt_of(BLOCK_SIZE * 6 + 5)
NUM_NEW = BLOCK_SIZE * 3


@contextmanager
def prefill_and_decode(
    model_dir: Path, store: NodeStore, weights: Weights = "int4", num_blocks: int = 64
) -> Iterator[Handoff]:
    """A float32 engine that prefills for one of smaller weights, over one store."""
    with ExitStack() as stack:
        prefill = stack.enter_context(running(make_engine(model_dir, store, replica_id="prefill")))
        engine = make_engine(
            model_dir, store, replica_id="decode", weights=weights, is_off_chain=True, num_blocks=num_blocks
        )
        yield Handoff(prefill, stack.enter_context(running(engine)))


def long_answer(seed: int = 0) -> SamplingParams:
    return SamplingParams(NUM_NEW, temperature=0.0, ignore_eos=True, seed=seed)


def found_by_a_float32_engine(model_dir: Path, store: NodeStore, prompt: list[int], oracle: Oracle) -> Answer:
    """A new engine's answer to the prompt; that its tokens are right says that what it has found is float32's."""
    with running(make_engine(model_dir, store, replica_id="other")) as engine:
        answer = engine.greedy(prompt, 8)
        oracle.check(prompt, answer.token_ids, 8)
        return answer


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_what_decode_computes_is_found_by_nobody(tiny_model_dir: Path, oracle: Oracle, weights: Weights) -> None:
    with open_store(None) as store:
        with prefill_and_decode(tiny_model_dir, store, weights) as replicas:
            first = replicas.submit(PROMPT, long_answer(), "first").wait()
            assert first.cost.prefill_tokens == len(PROMPT)
            assert first.cost.decode_computed_tokens == 0
            history = PROMPT + first.token_ids
            # The same decode replica does not find the answer in its own pool either: prefill computes it.
            second = replicas.submit(history + prompt_of(40, seed=1), long_answer(), "second").wait()
            assert second.cost.device_tokens == len(PROMPT)
            assert second.cost.prefill_tokens == len(history) + 40 - len(PROMPT)
            assert second.cost.decode_computed_tokens == 0
        store.check_integrity()
        after = history + prompt_of(40, seed=1) + second.token_ids
        answer = found_by_a_float32_engine(tiny_model_dir, store, after, oracle)
        assert answer.cost.cached_tokens == len(history) + 40, "the prompts are there, the last answer is not"


def test_decode_reads_what_float32_has_stored(tiny_model_dir: Path, oracle: Oracle) -> None:
    with open_store(None) as store:
        with running(make_engine(tiny_model_dir, store)) as engine:
            history = PROMPT + engine.greedy(PROMPT, NUM_NEW).token_ids
        with prefill_and_decode(tiny_model_dir, store) as replicas:
            answer = replicas.submit(history, long_answer(), "r").wait()
            assert answer.cost.dram_tokens == len(history) - 1, "answers of float32 engines are found, tails too"
            assert not replicas.announced
        found = found_by_a_float32_engine(tiny_model_dir, store, history + answer.token_ids, oracle)
        assert found.cost.cached_tokens == len(history) - 1


def test_alone_it_keeps_nothing(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, store := open_store(None), weights="int4", is_off_chain=True)
    with store:
        with running(engine) as decode:
            for _ in range(2):
                answer = decode.submit(PROMPT, long_answer()).wait()
                assert answer.cost.decode_computed_tokens == len(PROMPT)
                assert decode.engine.stats()["num_used_blocks"] == 0
        assert store.stats().num_blocks == 0


def test_a_preempted_sequence_computes_its_answer_again(tiny_model_dir: Path, oracle: Oracle) -> None:
    prompts = [prompt_of(60, seed=i) for i in range(4)]
    # Four sequences of 108 tokens at their end want 28 blocks; the pool has 20.
    with open_store(None) as store:
        with prefill_and_decode(tiny_model_dir, store, num_blocks=20) as replicas:
            pending = [replicas.submit(p, long_answer(), f"r{i}") for i, p in enumerate(prompts)]
            answers = [request.wait() for request in pending]
            decode = replicas.decode.engine
            assert decode.stats()["preemptions"] >= 1
            assert all(len(answer.token_ids) == NUM_NEW for answer in answers)
            assert decode.counters["computed_prompt_tokens"] <= 4 + decode.stats()["preemptions"], "prompts came back"
            assert decode.counters["computed_tokens"] > 4 * NUM_NEW, "answers did not"
        for prompt, answer in zip(prompts, answers, strict=True):
            found = found_by_a_float32_engine(tiny_model_dir, store, prompt + answer.token_ids, oracle)
            assert found.cost.cached_tokens == len(prompt)


def test_it_hands_nothing_off(tiny_model_dir: Path) -> None:
    with open_store(None) as store, running(make_engine(tiny_model_dir, store, is_off_chain=True)) as engine:
        request = EngineRequest("r", as_token_ids(PROMPT), ROOT, (), None, handoff_owner="somebody")
        with pytest.raises(ValueError, match="other numerics"):
            engine.engine.submit(request, Listener())


def root_of(model_dir: Path, weights: Weights) -> BlockHash:
    return ModelRunner(model_dir, weights=weights).fingerprint("weights", BLOCK_SIZE).root_hash()


def ask(engine: EngineUnderTest, root: BlockHash) -> Answer:
    return engine.submit(PROMPT, SamplingParams(4, temperature=0.0, ignore_eos=True), root=root).wait()


def test_without_prefill_each_kind_of_weights_is_a_cache_of_its_own(tiny_model_dir: Path) -> None:
    """All of a chain is then computed by engines of one kind, so it is stored and found again by these alone."""
    kinds: tuple[Weights, ...] = ("float32", "bf16", "int4")
    roots = {weights: root_of(tiny_model_dir, weights) for weights in kinds}
    assert len(set(roots.values())) == 3
    with open_store(None) as store:
        for weights in kinds:
            with running(make_engine(tiny_model_dir, store, weights=weights)) as engine:
                assert ask(engine, roots[weights]).cost.cached_tokens == 0
        for weights in kinds:
            with running(make_engine(tiny_model_dir, store, weights=weights)) as engine:
                assert ask(engine, roots[weights]).cost.cached_tokens == len(PROMPT) - 1
