"""The choice of a token: draws, filters and log-probabilities against plain definitions of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cache.hashing import as_token_ids
from serving.engine.logits import LogitsRow
from serving.engine.sampler import Sampled, log_probabilities, sample, uniform
from serving.protocol import SamplingParams

INF = float("inf")


def params(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, seed=seed)


def row_at(position: int, param: SamplingParams) -> LogitsRow:
    """A sequence of `position` tokens, all of them prompt."""
    return LogitsRow(param, as_token_ids([0] * position), position)


def choose(logits: torch.Tensor, each: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    rows = [row_at(position, param) for position, param in zip(positions, each, strict=True)]
    return [sampled.token_id for sampled in sample(logits, rows)]


def draw_many(logits: torch.Tensor, param: SamplingParams, num: int) -> list[int]:
    return choose(logits.expand(num, -1), [param] * num, range(num))


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    assert choose(logits, [params(temperature=0.0)] * 5, range(5)) == logits.argmax(-1).tolist()


@given(seed=st.integers(-(2**63), 2**64), order=st.permutations(range(6)))
def test_a_draw_does_not_depend_on_the_batch(seed: int, order: list[int]) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    each = [params(0.8, 0.9, seed), params(0.0), params(1.5, 1.0, seed), params(1.0, 0.5, seed + 1), params(), params()]
    alone = [choose(logits[row : row + 1], [each[row]], [100 + row])[0] for row in range(6)]
    together = choose(logits[order], [each[row] for row in order], [100 + row for row in order])
    assert together == [alone[row] for row in order]


@given(seed=st.integers(), position=st.integers(0, 10**6))
def test_uniform_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    value = uniform(seed, position)
    assert 0.0 <= value < 1.0
    assert uniform(seed, position) == value
    assert uniform(seed, position + 1) != value
    assert uniform(seed + 1, position) != value


def test_uniform_is_the_same_in_every_process_and_release() -> None:
    """A turn that moves to another replica goes on with the same numbers."""
    expected = [0.011546754286331451, 0.08284268702737618, 0.46292535650502575]
    assert [uniform(0, 0), uniform(7, 1), uniform(-1, 5)] == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_probabilities(temperature: float) -> None:
    num_draws = 5_000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 1.5]])
    counts = np.bincount(draw_many(logits, params(temperature, seed=42), num_draws), minlength=6)
    expected = num_draws * torch.softmax(logits[0].double() / temperature, -1).numpy()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # the 99.9 % point with 5 degrees of freedom; the seed is fixed


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    drawn = {top_p: set(draw_many(logits, params(top_p=top_p), 500)) for top_p in (0.0, 0.39, 0.41, 0.69, 0.71, 0.95)}
    assert drawn == {0.0: {1}, 0.39: {1}, 0.41: {1, 3}, 0.69: {1, 3}, 0.71: {1, 2, 3}, 0.95: {0, 1, 2, 3}}


def test_top_p_keeps_the_proportions_of_what_it_keeps() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))
    counts = np.bincount(draw_many(logits, params(top_p=0.65), 10_000), minlength=4)
    assert counts[1] / 10_000 == pytest.approx(4 / 7, abs=0.02)


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=60),
    top_p=st.floats(0.01, 0.999),
    position=st.integers(0, 1000),
)
def test_a_drawn_token_is_in_the_nucleus(logits: list[float], top_p: float, position: int) -> None:
    (token,) = choose(torch.tensor([logits]), [params(top_p=top_p)], [position])
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    more_probable = probabilities[probabilities > probabilities[token]].sum()
    assert more_probable < top_p + 1e-12


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1.0, 2.0, 1e6])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_extreme_logits(temperature: float, top_p: float) -> None:
    rows = {
        1: [-INF, 3e38, -3e38, 0.0],
        2: [0.0, 1.0, INF, -INF],
        3: [-INF, -INF, -INF, -5.0],
        0: [1e30, -1e30, -1e30, -1e30],
    }
    logits = torch.tensor(list(rows.values()))
    drawn = choose(logits, [params(temperature, top_p)] * 4, range(4))
    assert drawn == list(rows)


def test_equal_logits_are_all_drawn() -> None:
    assert set(draw_many(torch.zeros(1, 4), params(), 200)) == {0, 1, 2, 3}


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 sequences"):
        sample(torch.zeros(2, 4), [row_at(0, params())])


# -- filters ------------------------------------------------------------------------------------------

NO_TIE = 1e-9


def candidates_by_definition(logits: list[float], param: SamplingParams) -> dict[int, float]:
    """Tokens that may be drawn and their weights, as vLLM defines the filters: min_p, then top_k, then top_p.

    Discards examples where rounding would decide.
    """
    scaled = [logit / param.temperature for logit in logits]
    weights = {token: math.exp(value - max(scaled)) for token, value in enumerate(scaled)}
    assume(all(abs(weight - param.min_p) > NO_TIE for weight in weights.values() if weight < 1))
    weights = {token: weight for token, weight in weights.items() if weight > 0 and weight >= param.min_p}
    if param.top_k:
        lowest = sorted((scaled[token] for token in weights), reverse=True)[: param.top_k][-1]
        weights = {token: weight for token, weight in weights.items() if scaled[token] >= lowest}
    kept, reached, total = {}, 0.0, sum(weights.values())
    for token in sorted(weights, key=lambda token: (-weights[token], token)):
        if param.top_p < 1:
            assume(abs(reached / total - param.top_p) > NO_TIE)
            if reached / total >= param.top_p:
                break
        kept[token] = weights[token]
        reached += weights[token]
    return kept


@given(
    logits=st.lists(st.floats(-15, 15, width=16), min_size=1, max_size=20),
    temperature=st.floats(0.2, 5.0),
    top_k=st.integers(0, 25),
    min_p=st.just(0.0) | st.floats(0.0, 1.0),
    top_p=st.just(1.0) | st.floats(0.01, 0.99),
    position=st.integers(0, 100),
)
def test_a_draw_is_the_one_that_the_definitions_give(
    logits: list[float], temperature: float, top_k: int, min_p: float, top_p: float, position: int
) -> None:
    param = replace(params(temperature, top_p, seed=5), top_k=top_k, min_p=min_p)
    weights = candidates_by_definition(logits, param)
    target, expected = uniform(5, position) * sum(weights.values()), -1
    for token in sorted(weights):
        assume(abs(target) > NO_TIE)
        expected, target = token, target - weights[token]
        if target < 0:
            break
    assert choose(torch.tensor([logits]), [param], [position]) == [expected]


PROBABILITIES = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize(
    ("top_k", "min_p", "top_p", "expected"),
    [
        (0, 0.0, 1.0, {0, 1, 2, 3}),
        (1, 0.0, 1.0, {1}),
        (2, 0.0, 1.0, {1, 3}),
        (3, 0.0, 1.0, {1, 2, 3}),
        (4, 0.0, 1.0, {0, 1, 2, 3}),
        (1000, 0.0, 1.0, {0, 1, 2, 3}),
        (0, 0.26, 1.0, {1, 2, 3}),
        (0, 0.74, 1.0, {1, 3}),
        (0, 0.76, 1.0, {1}),
        (0, 1.0, 1.0, {1}),
        (2, 0.26, 1.0, {1, 3}),
        (3, 0.74, 1.0, {1, 3}),
        (2, 0.0, 0.56, {1}),  # of two tokens the better one has 4/7
        (2, 0.0, 0.58, {1, 3}),
    ],
)
def test_filters_keep_the_likely_tokens(top_k: int, min_p: float, top_p: float, expected: set[int]) -> None:
    param = replace(params(top_p=top_p), top_k=top_k, min_p=min_p)
    assert set(draw_many(PROBABILITIES, param, 500)) == expected


def test_min_p_looks_at_the_probabilities_after_temperature() -> None:
    drawn = {t: set(draw_many(PROBABILITIES, replace(params(t), min_p=0.45), 300)) for t in (0.5, 1.0, 4.0)}
    assert drawn == {0.5: {1, 3}, 1.0: {1, 2, 3}, 4.0: {0, 1, 2, 3}}


def test_tokens_equal_to_the_last_of_top_k_are_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert set(draw_many(logits, replace(params(), top_k=2), 300)) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1.0, 1e6, 1e300])
def test_filters_take_extreme_logits(temperature: float) -> None:
    logits = torch.tensor([[-INF, 3e38, -3e38, 0.0], [0.0, 1.0, INF, -INF], [-INF, -INF, -INF, -5.0]])
    for top_k, min_p in ((1, 0.0), (1, 0.5), (1, 1.0)):
        param = replace(params(temperature, 0.9), top_k=top_k, min_p=min_p)
        assert choose(logits, [param] * 3, range(3)) == [1, 2, 3]


def test_top_k_looks_at_the_logits_where_the_temperature_makes_all_weights_equal() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert set(draw_many(logits, replace(params(1e300), top_k=2), 200)) == {1, 2}


# -- processing ---------------------------------------------------------------------------------------


def test_greedy_takes_the_best_of_the_processed_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.5]])
    greedy = params(temperature=0.0)
    history = as_token_ids([1, 1, 3])
    changes: list[tuple[int, SamplingParams]] = [
        (1, greedy),
        (3, replace(greedy, logit_bias=((1, -100.0),))),
        (0, replace(greedy, logit_bias=((0, 100.0),))),
        (2, replace(greedy, repetition_penalty=2.0)),
        (1, replace(greedy, presence_penalty=2.0)),  # only token 3 is of the answer
        (2, replace(greedy, presence_penalty=2.0, logit_bias=((1, -2.0),))),
        (3, replace(greedy, min_tokens=5, stop_token_ids=(1,))),
    ]
    rows = [LogitsRow(param, history, 2) for _, param in changes]
    for dtype in (torch.float32, torch.float64):
        before = logits.expand(len(rows), -1).to(dtype)
        shared = before.clone()
        assert [sampled.token_id for sampled in sample(shared, rows)] == [token for token, _ in changes]
        assert torch.equal(shared, before), "the logits are somebody else's"


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0, 1e300])
def test_the_one_token_that_is_allowed_comes(temperature: float) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    param = replace(params(temperature), min_tokens=2, stop_token_ids=tuple(i for i in range(50) if i != 17))
    assert set(draw_many(logits, param, 20)) == {17}
    assert set(draw_many(logits, replace(param, min_tokens=0), 20)) != {17}


@given(order=st.permutations(range(5)))
def test_processed_rows_do_not_depend_on_the_batch(order: list[int]) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    each = [
        replace(params(0.8, 0.9), repetition_penalty=1.3, num_logprobs=3),
        replace(params(0.0), presence_penalty=1.0),
        replace(params(1.5), top_k=5, logit_bias=((3, 4.0),)),
        params(),
        params(0.0),
    ]
    rows = [LogitsRow(param, as_token_ids(range(at, at + 12)), 4) for at, param in enumerate(each)]
    alone = [sample(logits[at : at + 1], [rows[at]])[0] for at in range(5)]
    assert sample(logits[order], [rows[at] for at in order]) == [alone[at] for at in order]


# -- log-probabilities --------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e4, 1e4, width=32) | st.just(-INF), min_size=1, max_size=50))
@example([0.0])
@example([-INF, -INF, 5.0])
@example([1e4, -1e4])
def test_log_probabilities_are_torchs(logits: list[float]) -> None:
    assume(max(logits) > -INF)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(log_probabilities(np.array(logits)), expected, rtol=1e-12, atol=1e-12)


def test_log_probabilities_of_infinite_logits_are_shared() -> None:
    assert log_probabilities(np.array([INF, 0.0, INF])).tolist() == [-math.log(2), -INF, -math.log(2)]
    assert log_probabilities(np.array([-INF, -INF])).tolist() == [-math.log(2), -math.log(2)]


@given(
    logits=st.lists(st.integers(-5, 5) | st.just(-INF), min_size=2, max_size=30),
    num_top=st.integers(0, 35),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_the_best_alternatives_in_order(logits: list[float], num_top: int, temperature: float) -> None:
    assume(max(logits) > -INF)
    param = replace(params(temperature), num_logprobs=num_top, repetition_penalty=1.5)
    ((logprobs, sampled),) = with_processed(torch.tensor([logits], dtype=torch.float32), [param])
    assert sampled.logprob is not None
    assert sampled.logprob.token_id == sampled.token_id
    assert sampled.logprob.logprob == pytest.approx(logprobs[sampled.token_id], abs=1e-12)
    ranking = sorted((token for token in range(len(logits)) if logprobs[token] > -INF), key=lambda t: (-logprobs[t], t))
    assert [token for token, _ in sampled.logprob.top] == ranking[:num_top]
    assert [value for _, value in sampled.logprob.top] == pytest.approx([logprobs[t] for t in ranking[:num_top]])


def with_processed(logits: torch.Tensor, each: Sequence[SamplingParams]) -> list[tuple[list[float], Sampled]]:
    """What was sampled behind a prompt of token 0, with torch's log-probabilities after the repetition penalty."""
    processed = logits.double().clone()
    for row, param in enumerate(each):
        value = processed[row, 0]
        penalty = param.repetition_penalty
        processed[row, 0] = value / penalty if value > 0 else value * penalty
    logprobs: list[list[float]] = torch.log_softmax(processed, -1).tolist()
    return list(zip(logprobs, sample(logits, [row_at(1, param) for param in each]), strict=True))


def test_log_probabilities_come_before_temperature_and_filters() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    param = replace(params(temperature=0.1), top_k=1, num_logprobs=3)
    (sampled,) = sample(logits, [row_at(1, param)])
    assert sampled.logprob is not None
    expected = torch.log_softmax(logits[0].double(), -1).tolist()
    assert dict(sampled.logprob.top) == pytest.approx(dict(enumerate(expected)))


def test_only_rows_that_ask_get_log_probabilities_and_the_tokens_are_the_same() -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(4))
    each = [params(0.0), params(0.9), params(0.0), params(0.9)]
    asked = [replace(param, num_logprobs=2) if at >= 2 else param for at, param in enumerate(each)]
    tokens = [sampled.token_id for sampled in sample(logits, [row_at(at, p) for at, p in enumerate(each)])]
    sampled = sample(logits, [row_at(at, p) for at, p in enumerate(asked)])
    assert [each.token_id for each in sampled] == tokens
    assert [each.logprob is not None for each in sampled] == [False, False, True, True]
