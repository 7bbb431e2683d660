"""What happens to a row of logits before its token is chosen: forbidding, bias, penalties.

In this order, which is vLLM's:

    grammar           tokens that it does not allow get -inf
    min_tokens        tokens that would end the answer too early get -inf, unless nothing else is allowed
    logit_bias        added
    repetition        positive logits divided, others multiplied; tokens of prompt and answer, each once
    frequency         subtracted once for each time that the answer has the token
    presence          subtracted once if the answer has it at all

Nothing is kept between two steps: all of it follows from the sequence's tokens, so a turn goes on the same on
another replica. Never chooses a token.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.hashing import TokenIds
from serving.engine.grammar import Mask
from serving.protocol import SamplingParams

Floats = npt.NDArray[np.float64]

MAX_PENALTY = 2.0
"""Largest presence and frequency penalty, as in OpenAI's API; also keeps the sums finite."""


@dataclass(frozen=True, slots=True)
class LogitsRow:
    """The sequence that a row of logits belongs to, and how its next token is to be chosen."""

    params: SamplingParams
    token_ids: TokenIds
    """Prompt and answer so far; read, never kept."""
    num_prompt_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    """The model's."""
    allowed: Mask | None = None
    """Tokens that the answer's grammar allows next, at least one; None: all."""

    @property
    def position(self) -> int:
        """Where the next token will stand in the sequence."""
        return len(self.token_ids)

    @property
    def output_ids(self) -> TokenIds:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def must_go_on(self) -> bool:
        """The next token may not be one that ends the answer."""
        return len(self.token_ids) - self.num_prompt_tokens < self.params.min_tokens

    @property
    def needs_processing(self) -> bool:
        """Whether `process` would do anything."""
        params = self.params
        return bool(
            self.allowed is not None
            or self.must_go_on
            or params.logit_bias
            or params.repetition_penalty != 1.0
            or params.frequency_penalty
            or params.presence_penalty
        )


def ends_answer(token_id: int, params: SamplingParams, eos_token_ids: frozenset[int]) -> bool:
    """Whether the answer is over with this token, which then is not part of its text."""
    return token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos)


def process(logits: Floats, row: LogitsRow) -> None:
    """Change one sequence's logits, `(vocab_size,)`, in place. They may be infinite, and never become NaN."""
    params = row.params
    # Absurd values may overflow to infinity, which the sampler can take.
    with np.errstate(over="ignore"):
        if row.allowed is not None:
            logits[~row.allowed] = -np.inf
        if row.must_go_on:
            _forbid(logits, {*params.stop_token_ids, *(() if params.ignore_eos else row.eos_token_ids)}, row.allowed)
        if params.logit_bias:
            token_ids, biases = zip(*params.logit_bias, strict=True)
            np.add.at(logits, list(token_ids), biases)
        if params.repetition_penalty != 1.0:
            _penalise_repetition(logits, row.token_ids, params.repetition_penalty)
        if params.frequency_penalty or params.presence_penalty:
            counts = np.bincount(row.output_ids)
            seen = np.flatnonzero(counts)
            logits[seen] -= params.frequency_penalty * counts[seen] + params.presence_penalty


def _forbid(logits: Floats, token_ids: set[int], allowed: Mask | None) -> None:
    known = [token_id for token_id in token_ids if token_id < len(logits)]
    rest = np.ones(len(logits), np.bool_) if allowed is None else allowed.copy()
    rest[known] = False
    if rest.any():  # if every token ended the answer, one of them would have to come all the same
        logits[known] = -np.inf


def _penalise_repetition(logits: Floats, token_ids: TokenIds, penalty: float) -> None:
    """As Keskar et al., "CTRL", section 4.1, with the sign taken into account, as everybody does it."""
    is_seen = np.zeros(len(logits), np.bool_)
    is_seen[token_ids] = True
    seen = np.flatnonzero(is_seen)
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise ValueError, naming the field, for parameters that no token can be chosen with."""
    rules = (
        ("max_tokens", params.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= params.temperature < math.inf, "at least 0 and finite"),
        ("top_p", 0 <= params.top_p <= 1, "from 0 to 1"),
        ("min_p", 0 <= params.min_p <= 1, "from 0 to 1"),
        ("top_k", params.top_k >= 0, "at least 0"),
        ("presence_penalty", abs(params.presence_penalty) <= MAX_PENALTY, "from -2 to 2"),
        ("frequency_penalty", abs(params.frequency_penalty) <= MAX_PENALTY, "from -2 to 2"),
        ("repetition_penalty", 0 < params.repetition_penalty < math.inf, "above 0 and finite"),
        ("logit_bias", _are_ids((i for i, _ in params.logit_bias), vocab_size), f"for ids below {vocab_size}"),
        ("logit_bias", all(math.isfinite(bias) for _, bias in params.logit_bias), "finite"),
        ("min_tokens", params.min_tokens >= 0, "at least 0"),
        ("stop_token_ids", _are_ids(params.stop_token_ids, vocab_size), f"ids below {vocab_size}"),
        ("num_logprobs", params.num_logprobs is None or params.num_logprobs >= 0, "None or at least 0"),
    )
    for name, is_kept, rule in rules:
        if not is_kept:
            raise ValueError(f"{name}={getattr(params, name)!r} is not allowed: it must be {rule}")


def _are_ids(token_ids: Iterable[int], vocab_size: int) -> bool:
    return all(0 <= token_id < vocab_size for token_id in token_ids)
