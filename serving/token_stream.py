"""From an engine's thread to an asyncio consumer, gathering what has piled up.

A hop between two deployments costs about a millisecond a message, on cores that the engines want, so tokens must not
cross one by one under load: the first goes at once, the rest in batches whose distance grows with the number of
streams, the end at once. What belongs to one choice stays in order and apart from the others.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

from serving.protocol import TokenBatch

ENDS_ALL = ("error", "lost")
"""Finish reasons after which nobody waits for the other choices, some of which may never have begun."""


class Pace:
    """How far apart the batches of a stream are, so that all streams of a replica together stay below a rate."""

    def __init__(
        self, min_interval_s: float = 0.02, max_interval_s: float = 0.1, max_batches_per_s: float = 60
    ) -> None:
        """`max_interval_s` comes first: nobody waits longer, however many streams there are."""
        self._min_interval_s = min_interval_s
        self._max_interval_s = max_interval_s
        self._max_batches_per_s = max_batches_per_s
        self._num_streams = 0

    def __repr__(self) -> str:
        return f"<Pace {self._num_streams} streams, {self.interval_s:.3f} s>"

    @contextmanager
    def stream(self) -> Iterator[None]:
        """One more stream while the block runs."""
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    @property
    def interval_s(self) -> float:
        """Between two batches of one stream."""
        return max(self._min_interval_s, min(self._max_interval_s, self._num_streams / self._max_batches_per_s))


class TokenStream:
    """One request's batches. `push` from any thread; iterate in the event loop that made the stream."""

    def __init__(self, pace: Pace, num_choices: int = 1) -> None:
        self._loop = asyncio.get_running_loop()
        self._pace = pace
        self._num_choices = num_choices
        self._lock = threading.Lock()
        self._queue: deque[TokenBatch] = deque()
        self._has_some = asyncio.Event()
        self._has_end = asyncio.Event()

    def push(self, batch: TokenBatch) -> None:
        """Append a batch. One pushed after the loop has ended is lost, with whoever would have read it."""
        with self._lock:
            self._queue.append(batch)
            must_wake = len(self._queue) == 1
        if self._loop.is_closed():
            return
        if must_wake:
            self._loop.call_soon_threadsafe(self._has_some.set)
        if batch.finish_reason is not None:
            self._loop.call_soon_threadsafe(self._has_end.set)

    async def __aiter__(self) -> AsyncIterator[TokenBatch]:
        """Merged batches until every choice has its finish reason, or one of them a reason that ends them all."""
        num_open = self._num_choices
        with self._pace.stream():
            while True:
                await self._has_some.wait()
                self._has_some.clear()
                self._has_end.clear()
                for batch in merge(self._take()):
                    yield batch
                    num_open -= batch.finish_reason is not None
                    if not num_open or batch.finish_reason in ENDS_ALL:
                        return
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pace.interval_s):
                        await self._has_end.wait()

    def _take(self) -> list[TokenBatch]:
        with self._lock:
            taken = list(self._queue)
            self._queue.clear()
        return taken


def merge(batches: list[TokenBatch]) -> list[TokenBatch]:
    """One batch for each choice, in the order of their last ones.

    It has the tokens, text and log-probabilities of the choice's batches in order; finish and usage are the last's.
    """
    by_choice: dict[int, list[TokenBatch]] = {}
    for batch in batches:
        parts = by_choice.pop(batch.choice, [])  # and put in again: a dict keeps the order of insertion
        parts.append(batch)
        by_choice[batch.choice] = parts
    return [_join(parts) for parts in by_choice.values()]


def _join(parts: list[TokenBatch]) -> TokenBatch:
    last = parts[-1]
    return TokenBatch(
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        text="".join(part.text for part in parts),
        finish_reason=last.finish_reason,
        usage=last.usage,
        choice=last.choice,
        logprobs=tuple(logprob for part in parts for logprob in part.logprobs),
    )
