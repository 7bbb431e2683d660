"""Load the stored part of a prompt, compute it, or both at once from its two ends: what is ready first.

    tokens      |  in the pool  |  computed from the front >      < loaded from the back  |  to compute anyway  |
                0             first                            meeting                 stored end

Pure: estimates from a `CostModel` in, a plan out. The load runs beside the computing, so together they take the
longer of the two; the best place to meet is where both take the same.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from cache.messages import LoadPiece
from router.cost import CostModel, Source
from serving.protocol import LoadPlan

LOADS_CLEARLY_FASTER = 8.0
"""From this ratio on everything is loaded.

Computing would save less than a ninth of the time, but comes in steps that can't be taken back and holds up everybody
else in the batch. Measured with a link of 100, 200 and 400 MB/s, ratios of about 5, 10 and 20: both at once took
0.91, 1.07 and 1.01 times as long as the load alone.
"""
COMPUTES_CLEARLY_FASTER = 20.0
"""From this ratio on everything is computed. A load beside it holds up nobody, so it may help with little."""

Stretch = tuple[Source, int]
"""Consecutive stored tokens and where they are."""


def stretches(pieces: Iterable[LoadPiece], first_token: int, block_size: int) -> list[Stretch]:
    """What is to be loaded behind the first `first_token` tokens of a prompt, in the order of the prompt."""
    found: list[Stretch] = []
    for piece in pieces:
        begin = max(piece.first_block * block_size, first_token)
        num_tokens = piece.first_block * block_size + piece.num_tokens - begin
        if num_tokens > 0:
            found.append((piece.tier, num_tokens))
    return found


def plan_load(stored: Sequence[Stretch], first_token: int, block_size: int, costs: CostModel) -> LoadPlan:
    """The plan for stored tokens that follow `first_token` others which are in the pool already.

    Its estimate is never above that of loading everything or of computing everything.
    """
    num_tokens = sum(count for _, count in stored)
    load_s = _seconds_to_load(stored, 0, costs)
    compute_s = costs.seconds_to_compute(num_tokens, first_token)
    if load_s * LOADS_CLEARLY_FASTER <= compute_s:
        return LoadPlan("load", num_tokens, 0, load_s)
    if compute_s * COMPUTES_CLEARLY_FASTER <= load_s:
        return LoadPlan("compute", 0, num_tokens, compute_s)
    places = _meeting_places(num_tokens, first_token, block_size)

    def seconds(num_computed: int) -> tuple[float, float]:
        return costs.seconds_to_compute(num_computed, first_token), _seconds_to_load(stored, num_computed, costs)

    # With every step to the right computing takes longer and loading less.
    at = bisect_left(places, True, key=lambda place: (lambda s: s[0] >= s[1])(seconds(place)))
    best = min(places[max(0, at - 1) : at + 1], key=lambda place: max(seconds(place)))
    return LoadPlan("both", num_tokens - best, best, max(seconds(best)))


def _meeting_places(num_tokens: int, first_token: int, block_size: int) -> list[int]:
    """How many tokens may be computed: up to the end of any block, or none, or all."""
    first_end = (first_token // block_size + 1) * block_size - first_token
    return [0, *range(first_end, num_tokens, block_size), num_tokens]


def _seconds_to_load(stored: Sequence[Stretch], num_left_out: int, costs: CostModel) -> float:
    """Time to load all but the first `num_left_out` tokens."""
    seconds = 0.0
    for source, count in stored:
        seconds += costs.seconds_to_load(source, max(0, count - num_left_out))
        num_left_out = max(0, num_left_out - count)
    return seconds
