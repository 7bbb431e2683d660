"""Chooses the next token of each sequence from its logits.

    logits -> process (see `logits`) -> [log-probabilities] -> temperature -> min_p, top_k, top_p -> draw

So log-probabilities under a grammar are those among the tokens that it allows. A draw is a function of (logits,
parameters, tokens so far, seed, position) alone: never of the batch, of the order of the calls, or of the process. So a
turn that moves to another replica goes on as it would have here.
Greedy rows that ask for nothing else cost one argmax over the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from serving.engine.logits import Floats, LogitsRow, process
from serving.protocol import SamplingParams, TokenLogprob

Ids = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that was chosen."""

    token_id: int
    logprob: TokenLogprob | None = None
    """If it was asked for."""


def sample(logits: torch.Tensor, rows: Sequence[LogitsRow]) -> list[Sampled]:
    """The next token for each row of `logits`, `(n, vocab_size)`, which are left as they are.

    Temperature 0 is greedy. Infinite logits are allowed, NaN is not.
    """
    if len(logits) != len(rows):
        raise ValueError(f"there are {len(logits)} rows of logits for {len(rows)} sequences")
    best: list[int] = logits.argmax(dim=-1).tolist()
    return [_sample_row(logits[at], row, best[at]) for at, row in enumerate(rows)]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a seed at a position; any two integers will do.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3") is counter-based: no state to carry.
    """
    bits = np.random.Philox(key=seed % 2**64, counter=position % 2**64).random_raw()
    # 52 bits, not 53: then u * total stays below total for every total, and no draw falls off the end.
    return (int(bits) >> 12) * 2.0**-52


def log_probabilities(logits: Floats) -> Floats:
    """log(softmax(logits)); where logits are infinite, those that are share all the probability."""
    relative = _relative(logits)
    log_total: float = np.log(np.exp(relative).sum())
    return relative - log_total


def _sample_row(logits: torch.Tensor, row: LogitsRow, best: int) -> Sampled:
    params = row.params
    if params.temperature == 0 and params.num_logprobs is None and not row.needs_processing:
        return Sampled(best)
    values: Floats = logits.to("cpu", torch.float64, copy=True).numpy()
    if row.needs_processing:
        process(values, row)
        best = int(values.argmax())
    token_id = _draw(values, params, row.position) if params.temperature > 0 else best
    if params.num_logprobs is None:
        return Sampled(token_id)
    return Sampled(token_id, _logprob(values, token_id, params.num_logprobs))


def _logprob(logits: Floats, token_id: int, num_top: int) -> TokenLogprob:
    """The token's log-probability and the best ones; impossible tokens are not among those."""
    logprobs = log_probabilities(logits)
    top = _keep_top(logprobs, np.flatnonzero(logprobs > -np.inf), num_top) if num_top else np.empty(0, np.intp)
    # Stable, and the ids ascend: the lower id comes first where two are equal.
    best = top[np.argsort(-logprobs[top], kind="stable")][:num_top]
    pairs = zip(best.tolist(), logprobs[best].tolist(), strict=True)
    return TokenLogprob(token_id, float(logprobs[token_id]), tuple(pairs))


def _draw(logits: Floats, params: SamplingParams, position: int) -> int:
    # Each filter keeps the tokens above some place of the same ranking, so the order of min_p and top_k does not
    # matter. top_k first spares the others work; it looks at the logits, as weights may become equal by rounding.
    candidates = _keep_top(logits, np.arange(len(logits)), params.top_k) if params.top_k else np.arange(len(logits))
    weights = _weights(logits[candidates], params.temperature)
    kept = _nucleus(weights, np.flatnonzero(weights >= params.min_p if params.min_p else weights), params.top_p)
    # In order of the ids, not of the weights: two near-equal weights may swap places when they come from another
    # batch, and would then take each other's share of [0, 1).
    cumulative = weights[kept].cumsum()
    target = uniform(params.seed, position) * cumulative[-1]
    return int(candidates[kept[cumulative.searchsorted(target, side="right")]])


def _keep_top(values: Floats, ids: Ids, num_kept: int) -> Ids:
    """Those of the ascending `ids` with the `num_kept` largest values, and all that are equal to the last of them."""
    if num_kept >= len(ids):
        return ids
    ranked = values[ids]
    at = len(ids) - num_kept
    kept: Ids = ids[ranked >= np.partition(ranked, at)[at]]
    return kept


def _weights(logits: Floats, temperature: float) -> Floats:
    """exp(logits / temperature), scaled so that the largest is 1."""
    # A tiny temperature may overflow to -inf, whose weight is 0, as it should be.
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(_relative(logits) / temperature)


def _relative(logits: Floats) -> Floats:
    """Logits less the largest. That itself becomes 0 rather than being computed: it may be infinite."""
    peak = logits.max()
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(logits == peak, 0.0, logits - peak)


def _nucleus(weights: Floats, candidates: Ids, top_p: float) -> Ids:
    """Ascending ids of the fewest candidates, most probable first, whose probabilities reach `top_p`; at least one.

    `candidates` ascend, and their probabilities are those among themselves.
    """
    if top_p >= 1.0:
        return candidates
    total = weights[candidates].sum()
    # Tokens below this hold less than 1 - top_p together, so none of them is in; most need not be sorted.
    floor = (1.0 - top_p) * total / len(candidates)
    likely = candidates[weights[candidates] >= floor]
    likely = likely[np.argsort(-weights[likely], kind="stable")]
    num_kept = int(weights[likely].cumsum().searchsorted(top_p * total, side="left")) + 1
    return np.sort(likely[:num_kept])
