"""Bias, penalties and forbidden tokens against a plain loop over the vocabulary."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.hashing import as_token_ids
from serving.engine.logits import LogitsRow, check_params, ends_answer, process
from serving.protocol import SamplingParams

VOCAB_SIZE = 12
EOS = frozenset({2})
PLAIN = SamplingParams(8)
INF = float("inf")

logit_lists = st.lists(
    st.floats(-30, 30, width=32) | st.sampled_from([0.0, -INF, INF, 3e38, -3e38]),
    min_size=VOCAB_SIZE,
    max_size=VOCAB_SIZE,
)
ids = st.integers(0, VOCAB_SIZE - 1)
penalties = st.floats(-2, 2)
all_params = st.builds(
    SamplingParams,
    max_tokens=st.just(8),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.floats(0.1, 10.0),
    logit_bias=st.lists(st.tuples(ids, st.floats(-100, 100)), max_size=4).map(tuple),
    min_tokens=st.integers(0, 8),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
)


def row_of(params: SamplingParams, prompt: list[int], output: list[int]) -> LogitsRow:
    return LogitsRow(params, as_token_ids(prompt + output), len(prompt), EOS)


def processed(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    values = np.array(logits, np.float64)
    process(values, row_of(params, prompt, output))
    result: list[float] = values.tolist()
    return result


def by_definition(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    result = []
    for token_id, logit in enumerate(logits):
        ends = token_id in params.stop_token_ids or (token_id in EOS and not params.ignore_eos)
        value = -INF if ends and len(output) < params.min_tokens else logit
        value += sum(bias for biased_id, bias in params.logit_bias if biased_id == token_id)
        if token_id in prompt or token_id in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        if token_id in output:
            value -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
        result.append(value)
    return result


@given(
    logits=logit_lists,
    params=all_params,
    prompt=st.lists(ids, min_size=1, max_size=10),
    output=st.lists(ids, max_size=10),
)
def test_all_at_once_is_what_a_plain_loop_does(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> None:
    got = processed(logits, params, prompt, output)
    assert got == pytest.approx(by_definition(logits, params, prompt, output), rel=1e-12, abs=1e-9)
    assert not any(map(math.isnan, got))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"presence_penalty": 0.5}, [0.0, 1.0, 2.0, 2.5, 4.0, -5.5]),
        ({"frequency_penalty": 0.5}, [0.0, 1.0, 2.0, 2.0, 4.0, -5.5]),
        ({"frequency_penalty": -2.0}, [0.0, 1.0, 2.0, 7.0, 4.0, -3.0]),
        ({"repetition_penalty": 2.0}, [0.0, 0.5, 2.0, 1.5, 4.0, -10.0]),
        ({"logit_bias": ((0, 100.0), (4, -100.0))}, [100.0, 1.0, 2.0, 3.0, -96.0, -5.0]),
        ({"logit_bias": ((0, 1.0), (0, 2.0))}, [3.0, 1.0, 2.0, 3.0, 4.0, -5.0]),
        ({"min_tokens": 4}, [0.0, 1.0, -INF, 3.0, 4.0, -5.0]),
        ({"min_tokens": 4, "stop_token_ids": (4,)}, [0.0, 1.0, -INF, 3.0, -INF, -5.0]),
        ({"min_tokens": 4, "ignore_eos": True}, [0.0, 1.0, 2.0, 3.0, 4.0, -5.0]),
        ({"min_tokens": 3}, [0.0, 1.0, 2.0, 3.0, 4.0, -5.0]),
        ({"stop_token_ids": (4,)}, [0.0, 1.0, 2.0, 3.0, 4.0, -5.0]),
    ],
)
def test_each_by_itself(change: dict[str, Any], expected: list[float]) -> None:
    """Token 1 is in the prompt, 3 twice and 5 once in the answer; 2 is the end-of-sequence token."""
    params = replace(PLAIN, **change)
    assert processed([0.0, 1.0, 2.0, 3.0, 4.0, -5.0], params, [1, 1], [3, 5, 3]) == expected
    is_changed = expected != [0.0, 1.0, 2.0, 3.0, 4.0, -5.0]
    assert row_of(params, [1, 1], [3, 5, 3]).needs_processing or not is_changed


def test_most_rows_need_no_processing() -> None:
    idle = SamplingParams(8, top_k=5, min_p=0.1, stop_token_ids=(3,), ignore_eos=True, min_tokens=3, num_logprobs=2)
    assert not row_of(PLAIN, [1], [3]).needs_processing
    assert not row_of(idle, [1], [3, 5, 3]).needs_processing
    assert row_of(idle, [1], [3, 5]).needs_processing


@pytest.mark.parametrize("count", [1_000, 100_000])
def test_large_counts_stay_finite_and_exact(count: int) -> None:
    params = replace(PLAIN, frequency_penalty=2.0, presence_penalty=2.0)
    assert processed([5.0, 1.0], params, [1], [0] * count) == [5.0 - 2.0 * count - 2.0, 1.0]


def test_absurd_penalties_overflow_to_infinity_and_not_further() -> None:
    params = replace(PLAIN, repetition_penalty=1e-308, logit_bias=((0, 1e308),), frequency_penalty=2.0)
    assert processed([1e30, 1.0, -1.0], params, [0], [0, 2]) == [INF, 1.0, -1e-308 - 2.0]


def test_where_every_token_ends_the_answer_none_is_forbidden() -> None:
    params = replace(PLAIN, min_tokens=1, stop_token_ids=(0, 1))
    assert processed([1.0, 2.0, 3.0], params, [0], []) == [1.0, 2.0, 3.0]
    assert processed([1.0, 2.0, 3.0, 4.0], params, [0], []) == [-INF, -INF, -INF, 4.0]


def test_an_eos_token_beyond_the_vocabulary_is_no_matter() -> None:
    values = np.zeros(2)
    process(values, LogitsRow(replace(PLAIN, min_tokens=1), as_token_ids([0]), 1, frozenset({1, 7})))
    assert values.tolist() == [0.0, -INF]


def test_what_ends_an_answer() -> None:
    assert ends_answer(2, PLAIN, EOS)
    assert not ends_answer(3, PLAIN, EOS)
    assert not ends_answer(2, replace(PLAIN, ignore_eos=True), EOS)
    assert ends_answer(3, replace(PLAIN, stop_token_ids=(3,)), EOS)
    assert ends_answer(2, replace(PLAIN, stop_token_ids=(2,), ignore_eos=True), EOS)


@given(all_params)
def test_params_in_their_ranges_are_allowed(params: SamplingParams) -> None:
    check_params(params, VOCAB_SIZE)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": INF},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"top_k": -1},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": INF},
        {"logit_bias": ((VOCAB_SIZE, 1.0),)},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((0, math.nan),)},
        {"min_tokens": -1},
        {"stop_token_ids": (VOCAB_SIZE,)},
        {"num_logprobs": -1},
    ],
)
def test_params_out_of_their_ranges_are_refused_by_name(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"^{name}=.* must be "):
        check_params(replace(PLAIN, **change), VOCAB_SIZE)
