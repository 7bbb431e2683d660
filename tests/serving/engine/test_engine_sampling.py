"""Every sampling parameter through the engine, on a tiny random model: that it arrives, and what it does there."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.engine.sequence import Listener
from serving.protocol import SamplingParams, TokenBatch, TokenLogprob
from tests.oracle import Oracle
from tests.serving.engine.harness import EngineUnderTest, make_engine, prompt_of, running
from tests.tiny_models import VOCAB_SIZE

EOS = 2
GREEDY = SamplingParams(16, temperature=0.0)
PROMPT = prompt_of(30)


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[EngineUnderTest]:
    with running(make_engine(tiny_model_dir, num_blocks=128)) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, local_files_only=True)
    return loaded.eval()


def batches_of(engine: EngineUnderTest, params: SamplingParams, prompt: list[int] = PROMPT) -> list[TokenBatch]:
    pending = engine.submit(prompt, params)
    batches = [pending.first()]
    while batches[-1].finish_reason is None:
        batches.append(pending.first())
    return batches


def tokens_of(engine: EngineUnderTest, params: SamplingParams, prompt: list[int] = PROMPT) -> list[int]:
    return [token_id for batch in batches_of(engine, params, prompt) for token_id in batch.token_ids]


def forcing(*token_ids: int, params: SamplingParams = GREEDY) -> SamplingParams:
    """Only these tokens can come, the first one first."""
    biases = tuple((token_id, 200.0 / (at + 1)) for at, token_id in enumerate(token_ids))
    return replace(params, logit_bias=biases)


def test_logit_bias_forces_a_token_and_forbids_another(engine: EngineUnderTest) -> None:
    assert tokens_of(engine, forcing(77)) == [77] * 16
    assert tokens_of(engine, forcing(77, params=SamplingParams(16, seed=3))) == [77] * 16
    plain = tokens_of(engine, GREEDY)
    forbidden = tokens_of(engine, replace(GREEDY, logit_bias=((plain[0], -100.0),)))
    assert plain[0] not in forbidden


def test_the_answer_ends_with_eos_or_goes_on_if_that_is_ignored(engine: EngineUnderTest) -> None:
    (ended,) = batches_of(engine, forcing(EOS))
    assert (ended.token_ids, ended.text, ended.finish_reason) == ((EOS,), "", "stop")
    ignored = batches_of(engine, replace(forcing(EOS), ignore_eos=True))
    assert [batch.token_ids for batch in ignored] == [(EOS,)] * 16
    assert ignored[-1].finish_reason == "length"


def test_stop_tokens_end_the_answer_and_are_not_in_its_text(engine: EngineUnderTest, tiny_model_dir: Path) -> None:
    plain = tokens_of(engine, GREEDY)
    stop = next(token_id for token_id in plain if plain.index(token_id) >= 4)
    batches = batches_of(engine, replace(GREEDY, stop_token_ids=(299, stop)))
    answer = plain[: plain.index(stop) + 1]
    assert [token_id for batch in batches for token_id in batch.token_ids] == answer
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert "".join(batch.text for batch in batches) == tokenizer.decode(answer[:-1], skip_special_tokens=True)
    usage = batches[-1].usage
    assert usage is not None
    assert (batches[-1].finish_reason, usage.completion_tokens) == ("stop", len(answer))


def test_min_tokens_keeps_stop_tokens_and_eos_away(engine: EngineUnderTest) -> None:
    for params in (forcing(EOS, 77), replace(forcing(88, 77), stop_token_ids=(88,))):
        end = params.logit_bias[0][0]
        assert tokens_of(engine, params) == [end]
        assert tokens_of(engine, replace(params, min_tokens=5)) == [77] * 5 + [end]
    ignoring = replace(forcing(EOS, 77), ignore_eos=True, min_tokens=5)
    assert tokens_of(engine, ignoring) == [EOS] * 16, "then it is a token like others"


def test_min_tokens_lets_stop_strings_pass_until_then(engine: EngineUnderTest, tiny_model_dir: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model_dir)
    letter: str = tokenizer.decode([77])
    assert letter.strip()
    params = replace(forcing(77), stop=(letter,))
    (at_once,) = batches_of(engine, params)
    assert (at_once.text, at_once.finish_reason) == ("", "stop")
    later = batches_of(engine, replace(params, min_tokens=5))
    assert len(later) == 5
    assert ("".join(batch.text for batch in later), later[-1].finish_reason) == (letter * 4, "stop")


def test_penalties_count_the_answer_alone(engine: EngineUnderTest) -> None:
    plain = tokens_of(engine, GREEDY)
    pushed = replace(GREEDY, logit_bias=((plain[0], 20.0),))
    assert tokens_of(engine, pushed) == [plain[0]] * 16
    frequent = replace(pushed, frequency_penalty=2.0)
    assert 1 <= tokens_of(engine, frequent).count(plain[0]) < 16
    # However often the prompt has it: if that counted, it would never come.
    assert tokens_of(engine, frequent, PROMPT + [plain[0]] * 30)[0] == plain[0]
    present = tokens_of(engine, replace(GREEDY, presence_penalty=2.0, max_tokens=60))
    assert present != tokens_of(engine, replace(GREEDY, max_tokens=60))
    assert present[0] == plain[0], "nothing is in the answer yet"


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(engine: EngineUnderTest, model: Any, penalty: float) -> None:
    for seed in range(3):
        prompt = prompt_of(25, seed=seed)
        params = replace(GREEDY, max_tokens=24, repetition_penalty=penalty)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=False,
                repetition_penalty=penalty,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        tokens = tokens_of(engine, params, prompt)
        assert tokens == expected[0, 25:].tolist()
        assert tokens != tokens_of(engine, replace(GREEDY, max_tokens=24), prompt)


def test_log_probabilities_are_those_of_the_model(engine: EngineUnderTest, model: Any) -> None:
    for params in (replace(GREEDY, num_logprobs=4), SamplingParams(16, temperature=0.8, seed=1, num_logprobs=4)):
        batches = batches_of(engine, params)
        assert all(len(batch.logprobs) == len(batch.token_ids) for batch in batches)
        logprobs = [logprob for batch in batches for logprob in batch.logprobs]
        tokens = [logprob.token_id for logprob in logprobs]
        assert tokens == tokens_of(engine, replace(params, num_logprobs=None))
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
        expected = torch.log_softmax(logits.double(), -1)
        for at, logprob in enumerate(logprobs):
            check_logprob(logprob, expected[at], 4)


def check_logprob(logprob: TokenLogprob, expected: torch.Tensor, num_top: int) -> None:
    assert logprob.logprob == pytest.approx(float(expected[logprob.token_id]), abs=1e-3)
    assert [value for _, value in logprob.top] == pytest.approx(expected.topk(num_top).values.tolist(), abs=1e-3)
    assert len({token_id for token_id, _ in logprob.top}) == num_top


def test_the_last_token_has_its_log_probability_too(engine: EngineUnderTest) -> None:
    (ended,) = batches_of(engine, replace(forcing(EOS), num_logprobs=0))
    assert ended.finish_reason == "stop"
    (logprob,) = ended.logprobs
    assert (logprob.token_id, logprob.top) == (EOS, ())
    assert logprob.logprob == pytest.approx(0.0, abs=1e-9)
    assert all(not batch.logprobs for batch in batches_of(engine, GREEDY))


def test_top_k_and_min_p_of_the_best_token_alone_are_greedy(engine: EngineUnderTest) -> None:
    hot = SamplingParams(16, temperature=1.5, seed=9)
    greedy = tokens_of(engine, GREEDY)
    assert tokens_of(engine, hot) != greedy
    assert tokens_of(engine, replace(hot, top_k=1)) == greedy
    assert tokens_of(engine, replace(hot, min_p=1.0)) == greedy
    assert tokens_of(engine, replace(hot, top_k=10 * VOCAB_SIZE)) == tokens_of(engine, hot)


def test_no_parameter_of_others_changes_an_answer(engine: EngineUnderTest, oracle: Oracle) -> None:
    mixed = [
        GREEDY,
        SamplingParams(16, temperature=0.9, seed=1, top_k=20, min_p=0.02, top_p=0.9),
        replace(GREEDY, repetition_penalty=1.3, presence_penalty=0.5, num_logprobs=3),
        SamplingParams(16, seed=2, frequency_penalty=1.0, logit_bias=((77, 3.0),), min_tokens=8),
    ]
    alone = [tokens_of(engine, params) for params in mixed]
    oracle.check(PROMPT, alone[0], 16)
    together = [engine.submit(PROMPT, params) for params in mixed]
    assert [pending.wait().token_ids for pending in together] == alone


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (replace(GREEDY, logit_bias=((VOCAB_SIZE, 1.0),)), "logit_bias="),
        (replace(GREEDY, stop_token_ids=(-1,)), "stop_token_ids="),
        (replace(GREEDY, repetition_penalty=0.0), "repetition_penalty=0.0"),
        (replace(GREEDY, temperature=float("nan")), "temperature=nan"),
    ],
)
def test_what_would_break_a_step_is_refused(engine: EngineUnderTest, params: SamplingParams, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        engine.submit(PROMPT, params)


@pytest.mark.parametrize("prompt", [[1, VOCAB_SIZE], [-1, 1]])
def test_token_ids_the_model_does_not_have_are_refused(engine: EngineUnderTest, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=f"from 0 to {VOCAB_SIZE - 1}"):
        engine.submit(prompt, GREEDY, listener=Listener())
