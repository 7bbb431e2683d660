"""From an engine's thread to an asyncio consumer, gathering what has piled up.

A hop between two deployments costs about a millisecond a message, so tokens must not cross one by one under
load: the first goes at once, the rest in batches no closer together than `min_interval_s`.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator

from serving.protocol import TokenBatch


class TokenStream:
    """One request's batches. `push` from any thread; iterate in the event loop that made the stream."""

    def __init__(self, min_interval_s: float = 0.02) -> None:
        self._loop = asyncio.get_running_loop()
        self._min_interval_s = min_interval_s
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
        """Merged batches up to the one with a finish reason."""
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            batch = merge(self._take())
            yield batch
            if batch.finish_reason is not None:
                return
            await asyncio.sleep(self._min_interval_s)

    def _take(self) -> list[TokenBatch]:
        with self._lock:
            taken = list(self._queue)
            self._queue.clear()
        return taken


def merge(batches: list[TokenBatch]) -> TokenBatch:
    """One batch with the tokens and text of all, at least one, in order; finish and usage are the last one's."""
    last = batches[-1]
    token_ids = tuple(token_id for batch in batches for token_id in batch.token_ids)
    return TokenBatch(token_ids, "".join(batch.text for batch in batches), last.finish_reason, last.usage)
