"""Chooses the next token of each sequence from its logits.

A draw is a function of (logits, temperature, top_p, seed, position) alone: never of the batch, of the order
of the calls, or of the process. So a turn that moves to another replica goes on as it would have here.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from serving.protocol import SamplingParams

Floats = npt.NDArray[np.float64]


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """One token id for each row of `logits`, `(n, vocab_size)`.

    `positions[i]` is the position that row i's new token takes in its sequence. Temperature 0 is greedy.
    Infinite logits are allowed, NaN is not.
    """
    if not len(logits) == len(params) == len(positions):
        raise ValueError(f"{len(logits)} rows of logits, {len(params)} params and {len(positions)} positions differ")
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        if param.temperature > 0:
            token_ids[row] = _draw(logits[row].double().cpu().numpy(), param, position)
    return token_ids


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a seed at a position; any two integers will do.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") is counter-based: no state to carry.
    """
    bits = np.random.Philox(key=seed % 2**64, counter=position % 2**64).random_raw()
    # 52 bits, not 53: then u * total stays below total for every total, and no draw falls off the end.
    return (int(bits) >> 12) * 2.0**-52


def _draw(logits: Floats, param: SamplingParams, position: int) -> int:
    weights = _weights(logits, param.temperature)
    candidates = _nucleus(weights, param.top_p)
    # In order of the ids, not of the weights: two near-equal weights may swap places when they come from another
    # batch, and would then take each other's share of [0, 1).
    cumulative = weights[candidates].cumsum()
    target = uniform(param.seed, position) * cumulative[-1]
    return int(candidates[cumulative.searchsorted(target, side="right")])


def _weights(logits: Floats, temperature: float) -> Floats:
    """exp(logits / temperature), scaled so that the largest is 1."""
    peak = logits.max()
    # The peak itself is set to 0 rather than computed: it may be infinite. A tiny temperature may overflow
    # to -inf, whose weight is 0, as it should be.
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return np.exp(np.where(logits == peak, 0.0, logits - peak) / temperature)


def _nucleus(weights: Floats, top_p: float) -> npt.NDArray[np.intp]:
    """Ascending ids of the fewest tokens, most probable first, whose probabilities reach `top_p`; at least one."""
    if top_p >= 1.0:
        return np.flatnonzero(weights)
    total = weights.sum()
    # Tokens below this hold less than 1 - top_p together, so none of them is in; most need not be sorted.
    floor = (1.0 - top_p) * total / len(weights)
    likely = np.flatnonzero(weights >= floor)
    likely = likely[np.argsort(-weights[likely], kind="stable")]
    num_kept = int(weights[likely].cumsum().searchsorted(top_p * total, side="left")) + 1
    return np.sort(likely[:num_kept])
