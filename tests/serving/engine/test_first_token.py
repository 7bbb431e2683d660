"""The first token of an answer is sampled from prefill's logits, while the prompt's last blocks are on their way."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from serving.engine.sequence import Listener, Sequence
from serving.protocol import SamplingParams
from tests.oracle import Oracle
from tests.serving.engine.harness import BLOCK_SIZE, Handoff, Pending, make_engine, prompt_of, running
from tests.serving.engine.test_transfers import TIMEOUT_S, GatedStore, gated_store, is_still, wait_until

PROMPT = prompt_of(BLOCK_SIZE * 6 + 5)


@contextmanager
def replicas(model_dir: Path, store: GatedStore, *, sends_logits: bool = True) -> Iterator[Handoff]:
    with (
        running(make_engine(model_dir, store, replica_id="prefill")) as prefill,
        running(make_engine(model_dir, store, replica_id="decode")) as decode,
    ):
        yield Handoff(prefill, decode, sends_logits=sends_logits)


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens, temperature=0.0, **options)


def test_it_does_not_wait_for_the_last_blocks(tiny_model_dir: Path, oracle: Oracle) -> None:
    with gated_store() as store, replicas(tiny_model_dir, store) as handoff:
        store.stores.shut()
        pending = handoff.submit(PROMPT, greedy(6, ignore_eos=True), "r")
        first = pending.batches.get(timeout=TIMEOUT_S)
        assert len(first.token_ids) == 1
        assert not handoff.announced, "nothing can be loaded yet"
        assert handoff.decode.engine.counters["computed_tokens"] == 0
        store.stores.open()
        rest = pending.wait()
        oracle.check(PROMPT, [*first.token_ids, *rest.token_ids], 6)
        assert rest.cost.prefill_tokens == len(PROMPT)
        assert handoff.decode.engine.counters["computed_prompt_tokens"] == 0
        assert handoff.prefill.engine.counters["computed_prompt_tokens"] == len(PROMPT)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(12, temperature=0.9, top_p=0.9, seed=5, num_logprobs=3, ignore_eos=True),
        SamplingParams(12, temperature=0.0, repetition_penalty=1.5, logit_bias=((7, 4.0),), ignore_eos=True),
        SamplingParams(12, temperature=0.0, grammar='start: "a" /[b-d]{2,40}/'),
    ],
    ids=["drawn", "penalised", "grammar"],
)
def test_it_is_chosen_as_any_other(tiny_model_dir: Path, params: SamplingParams) -> None:
    with gated_store() as store, replicas(tiny_model_dir, store) as handoff:
        with running(make_engine(tiny_model_dir)) as alone:
            expected = alone.submit(PROMPT, params).wait()
        answer = handoff.submit(PROMPT, params, "r").wait()
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text


def test_an_answer_of_one_token_leaves_its_prompt_in_the_warehouse(tiny_model_dir: Path, oracle: Oracle) -> None:
    with gated_store() as store, replicas(tiny_model_dir, store) as handoff:
        (token_id,) = handoff.submit(PROMPT, greedy(1), "length").wait().token_ids
        oracle.check(PROMPT, [token_id], 1)
        tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
        other = prompt_of(BLOCK_SIZE * 6 + 5, seed=3)
        (first,) = handoff.submit(other, greedy(1), "other").wait().token_ids
        stopped = handoff.submit(
            prompt_of(BLOCK_SIZE * 5, seed=9) + other, greedy(9, stop=(tokenizer.decode([first]),)), "stop"
        ).wait()
        cost = stopped.cost
        assert cost.cached_tokens + cost.prefill_tokens + cost.decode_computed_tokens == cost.prompt_tokens
        wait_until(lambda: is_still(handoff.decode) and is_still(handoff.prefill))
        assert store.stats().handoff_bytes == 0
        with running(make_engine(tiny_model_dir, store, replica_id="another")) as another:
            found = another.greedy([*PROMPT, token_id], 2)
            assert found.cost.dram_tokens == len(PROMPT)


def test_a_cancelled_one_leaves_nothing_behind(tiny_model_dir: Path) -> None:
    with gated_store() as store, replicas(tiny_model_dir, store) as handoff:
        store.stores.shut()
        pending = handoff.submit(PROMPT, greedy(50), "r")
        pending.batches.get(timeout=TIMEOUT_S)
        handoff.decode.engine.cancel("r")
        handoff.prefill.engine.cancel("r")
        store.stores.open()
        wait_until(lambda: is_still(handoff.decode) and is_still(handoff.prefill))


@pytest.mark.parametrize("num_tokens", [BLOCK_SIZE * 6, len(PROMPT)])
def test_a_handoff_that_breaks_off_behind_it_goes_on_here(
    tiny_model_dir: Path, oracle: Oracle, num_tokens: int
) -> None:
    """Also where the first token needs a block that the prompt did not."""
    prompt = PROMPT[:num_tokens]
    with gated_store(handoff_bytes=100) as store, replicas(tiny_model_dir, store) as handoff:
        store.stores.shut()
        pending = handoff.submit(prompt, greedy(6, ignore_eos=True), "r")
        first = pending.batches.get(timeout=TIMEOUT_S)
        store.stores.open()  # and it refuses
        rest = pending.wait()
        oracle.check(prompt, [*first.token_ids, *rest.token_ids], 6)
        assert set(handoff.announced) == {(0, True)}, "chunks that were on their way are refused as well"
        assert rest.cost.decode_computed_tokens == len(prompt)


def test_logits_that_nothing_can_be_drawn_from_fail_their_request_alone(tiny_model_dir: Path, oracle: Oracle) -> None:
    params = SamplingParams(6, temperature=1.0)
    with gated_store() as store, running(make_engine(tiny_model_dir, store)) as engine:
        failed = Pending()

        def ask(sequence: Sequence) -> bool:
            vocab_size = len(AutoTokenizer.from_pretrained(tiny_model_dir))
            engine.engine.handoff_logits("r", np.full(vocab_size, np.nan, np.float32))
            return True

        listener = Listener(on_batch=failed.batches.put, ask_prefill=ask)
        engine.submit(PROMPT, params, listener=listener, request_id="r")
        assert failed.batches.get(timeout=TIMEOUT_S).finish_reason == "error"
        oracle.check(PROMPT, engine.greedy(PROMPT, 4).token_ids, 4)


def test_logits_that_come_too_late_are_not_used(tiny_model_dir: Path, oracle: Oracle) -> None:
    vocab_size = len(AutoTokenizer.from_pretrained(tiny_model_dir))
    for_another_token = np.zeros(vocab_size, np.float32)
    with gated_store() as store, replicas(tiny_model_dir, store, sends_logits=False) as handoff:
        pending = handoff.submit(PROMPT, greedy(40, ignore_eos=True), "r")
        first = pending.batches.get(timeout=TIMEOUT_S)
        for request_id in ("r", "unknown"):
            handoff.decode.engine.handoff_logits(request_id, for_another_token)
        oracle.check(PROMPT, [*first.token_ids, *pending.wait().token_ids], 40)
