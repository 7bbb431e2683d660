import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.sampler import sample, uniform
from serving.protocol import SamplingParams


def params(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, seed=seed)


def draw_many(logits: torch.Tensor, param: SamplingParams, num: int) -> list[int]:
    return sample(logits.expand(num, -1), [param] * num, range(num))


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    assert sample(logits, [params(temperature=0.0)] * 5, range(5)) == logits.argmax(-1).tolist()


@given(seed=st.integers(-(2**63), 2**64), order=st.permutations(range(6)))
def test_a_draw_does_not_depend_on_the_batch(seed: int, order: list[int]) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    each = [params(0.8, 0.9, seed), params(0.0), params(1.5, 1.0, seed), params(1.0, 0.5, seed + 1), params(), params()]
    alone = [sample(logits[row : row + 1], [each[row]], [100 + row])[0] for row in range(6)]
    together = sample(logits[order], [each[row] for row in order], [100 + row for row in order])
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
    (token,) = sample(torch.tensor([logits]), [params(top_p=top_p)], [position])
    probabilities = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    more_probable = probabilities[probabilities > probabilities[token]].sum()
    assert more_probable < top_p + 1e-12


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1.0, 2.0, 1e6])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_extreme_logits(temperature: float, top_p: float) -> None:
    inf = float("inf")
    rows = {
        1: [-inf, 3e38, -3e38, 0.0],
        2: [0.0, 1.0, inf, -inf],
        3: [-inf, -inf, -inf, -5.0],
        0: [1e30, -1e30, -1e30, -1e30],
    }
    logits = torch.tensor(list(rows.values()))
    drawn = sample(logits, [params(temperature, top_p)] * 4, range(4))
    assert drawn == list(rows)


def test_equal_logits_are_all_drawn() -> None:
    assert set(draw_many(torch.zeros(1, 4), params(), 200)) == {0, 1, 2, 3}


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows of logits, 1 params and 2 positions"):
        sample(torch.zeros(2, 4), [params()], [0, 1])
