"""From an engine's thread to an asyncio consumer, gathering what has piled up.

A hop between two deployments costs about a millisecond a message, so tokens must not cross one by one under
load: the first goes at once, the rest in batches no closer together than `min_interval_s`. What belongs to one
choice stays in order and apart from the others.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator

from serving.protocol import TokenBatch

ENDS_ALL = ("error", "lost")
"""Finish reasons after which nobody waits for the other choices, some of which may never have begun."""


class TokenStream:
    """One request's batches. `push` from any thread; iterate in the event loop that made the stream."""

    def __init__(self, min_interval_s: float = 0.02, num_choices: int = 1) -> None:
        self._loop = asyncio.get_running_loop()
        self._min_interval_s = min_interval_s
        self._num_choices = num_choices
        self._lock = threading.Lock()
        self._queue: deque[TokenBatch] = deque()
        self._has_some = asyncio.Event()

    def push(self, batch: TokenBatch) -> None:
        """Append a batch. One pushed after the loop has ended is lost, with whoever would have read it."""
        with self._lock:
            self._queue.append(batch)
            must_wake = len(self._queue) == 1
        if must_wake and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._has_some.set)

    async def __aiter__(self) -> AsyncIterator[TokenBatch]:
        """Merged batches until every choice has its finish reason, or one of them a reason that ends them all."""
        num_open = self._num_choices
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            for batch in merge(self._take()):
                yield batch
                num_open -= batch.finish_reason is not None
                if not num_open or batch.finish_reason in ENDS_ALL:
                    return
            await asyncio.sleep(self._min_interval_s)

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
