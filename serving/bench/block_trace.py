"""Traces of requests as block ids, and what a cache of whole blocks could reach on them at best.

A trace is a file of JSON lines, one request each, in the order of arrival:

    {"input_length": 1500, "hash_ids": [0, 7, 9]}        any other key is left alone

An id, a number or a string, names a block together with everything before it. The last block may be covered in part
by its prompt. Ids are numbered anew, from 0 up.
"""

import heapq
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import BenchError

_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One prompt."""

    block_ids: tuple[int, ...]
    num_tokens: int

    def hit_tokens(self, num_blocks: int, block_size: int) -> int:
        """Prompt tokens in its first `num_blocks` blocks."""
        return min(num_blocks * block_size, self.num_tokens)


def load_trace(path: Path, block_size: int, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a file, or all. Raises BenchError, which names the line."""
    requests: list[TraceRequest] = []
    numbers: dict[int | str, int] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(requests) == limit:
                    break
                if line.strip():
                    requests.append(_parse(line, f"{path}, line {number}", numbers))
    except OSError as error:
        raise BenchError(f"can't read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BenchError(f"{path} is no text: a trace is a file of JSON lines") from error
    if not requests:
        raise BenchError(f"{path} holds no requests")
    _check_block_size(requests, block_size, path)
    return requests


def _parse(line: str, where: str, numbers: dict[int | str, int]) -> TraceRequest:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise BenchError(f"{where}: no JSON: {error}") from error
    if not isinstance(entry, dict):
        raise BenchError(f"{where}: a request is a JSON object")
    ids, length = entry.get("hash_ids"), entry.get("input_length")
    if not isinstance(ids, list) or not all(type(i) in (int, str) for i in ids):
        raise BenchError(f"{where}: hash_ids must be a list of numbers or strings")
    if type(length) is not int or length < 0:
        raise BenchError(f"{where}: input_length must be a number of tokens")
    # An id names all that is before it too, so it can't come twice; where it does, the first one counts.
    return TraceRequest(tuple(dict.fromkeys(numbers.setdefault(i, len(numbers)) for i in ids)), length)


def _check_block_size(requests: Sequence[TraceRequest], block_size: int, path: Path) -> None:
    """The blocks should just cover the prompts."""
    num_blocks = sum(len(request.block_ids) for request in requests)
    num_tokens = sum(request.num_tokens for request in requests)
    num_partial = len(requests)
    if not (num_blocks - num_partial) * block_size <= num_tokens <= 1.5 * num_blocks * block_size:
        tokens_per_block = num_tokens / max(1, num_blocks)
        raise BenchError(
            f"{path}: {num_blocks:,} blocks for {num_tokens:,} tokens are {tokens_per_block:.3g} tokens a block, "
            f"not {block_size}: say how many with --block-size"
        )


def endless_hit_rate(requests: Sequence[TraceRequest], block_size: int) -> float:
    """Share of all prompt tokens that a cache without bounds finds."""
    seen: set[int] = set()
    hit_tokens = 0
    for request in requests:
        hit_tokens += request.hit_tokens(_num_leading(request, seen), block_size)
        seen.update(request.block_ids)
    return share(hit_tokens, requests)


def best_hit_rate(requests: Sequence[TraceRequest], block_size: int, num_blocks: int) -> float:
    """The same for a cache of `num_blocks` that knows the future (Belady): out goes the block used last from now on.

    A request's blocks are all taken in before any leaves. Among those used last at the same time, or never, the one
    farthest from its prompt's start goes.
    """
    held: dict[int, int] = {}
    """Each block's next use."""
    farthest: list[tuple[int, int, int]] = []
    hit_tokens = 0
    next_uses = _next_uses(requests)
    for request in requests:
        hit_tokens += request.hit_tokens(_num_leading(request, held), block_size)
        for depth, block_id in enumerate(request.block_ids):
            held[block_id] = next(next_uses)
            heapq.heappush(farthest, (-held[block_id], -depth, block_id))
        while len(held) > num_blocks:
            use, _, block_id = heapq.heappop(farthest)
            if held.get(block_id) == -use:
                del held[block_id]
    return share(hit_tokens, requests)


def _next_uses(requests: Sequence[TraceRequest]) -> Iterator[int]:
    """For each block of each request in turn: which later request uses it next."""
    following: list[int] = []
    used_at: dict[int, int] = {}
    for number in range(len(requests) - 1, -1, -1):
        for block_id in reversed(requests[number].block_ids):
            following.append(used_at.get(block_id, _NEVER))
            used_at[block_id] = number
    return reversed(following)


def _num_leading(request: TraceRequest, held: Collection[int]) -> int:
    """How many of its blocks are held, up to the first that is not."""
    for number, block_id in enumerate(request.block_ids):
        if block_id not in held:
            return number
    return len(request.block_ids)


def share(hit_tokens: int, requests: Sequence[TraceRequest]) -> float:
    """Of all prompt tokens; 0 if there are none."""
    return hit_tokens / max(1, sum(request.num_tokens for request in requests))
