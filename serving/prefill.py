"""The prefill deployment: computes the KV of long prompts and hands it off chunk by chunk.

A thin shell around one engine. Each chunk's blocks are committed to the node store and announced in the
response stream, so that decode loads them while the next chunk is computed. The logits after the last token go ahead
of the last chunk. Nothing is sampled here.
"""

import asyncio
from collections.abc import AsyncIterator

from cache.messages import PurgeQuery
from serving.engine.sequence import EngineRequest, Listener
from serving.engine.step_log import StepRecord
from serving.protocol import Logits, PrefillProgress, PrefillRequest
from serving.replica import EngineOptions, Replica


class PrefillReplica:
    """One replica of the deployment."""

    def __init__(self, options: EngineOptions) -> None:
        self._replica = Replica(options)

    async def prefill(self, request: PrefillRequest) -> AsyncIterator[PrefillProgress]:
        """Compute and hand off `request.token_ids`; the first message only says that the work is accepted."""
        self._replica.check_model(request.fingerprint)
        loop = asyncio.get_running_loop()
        progress: asyncio.Queue[PrefillProgress] = asyncio.Queue()
        node_id = self._replica.node_id

        def send(message: PrefillProgress) -> None:
            loop.call_soon_threadsafe(progress.put_nowait, message)

        def on_progress(num_tokens: int, num_computed: int, is_done: bool) -> None:
            send(PrefillProgress(num_tokens, node_id, num_computed, is_done))

        def on_logits(logits: Logits) -> None:
            send(PrefillProgress(0, node_id, logits=logits))

        self._replica.engine.submit(
            EngineRequest(
                request.request_id,
                request.token_ids,
                request.fingerprint.root_hash(),
                request.block_hashes,
                sampling=None,
                use_cache=request.use_cache,
                handoff_owner=request.lease_owner,
                handoff_first_block=request.first_block,
                wants_logits=request.wants_logits,
                origin=request.origin,
            ),
            Listener(on_progress=on_progress, on_logits=on_logits),
        )
        try:
            yield PrefillProgress(0, node_id)
            while True:
                message = await progress.get()
                yield message
                if message.done:
                    return
        finally:
            self._replica.engine.cancel(request.request_id)

    async def purge(self, query: PurgeQuery) -> int:
        """Forget what is meant; returns the number of blocks that the engine's pool held of it."""
        return await asyncio.wrap_future(self._replica.engine.purge(query))

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose engine has ended."""
        self._replica.engine.check_alive()

    def stats(self) -> dict[str, float]:
        """The engine's counters."""
        return self._replica.engine.stats()

    def steps(self, since: float) -> tuple[StepRecord, ...]:
        """The engine's steps that ended after `since`, by the monotonic clock of its machine."""
        return self._replica.engine.steps.since(since)

    def __del__(self) -> None:
        # Serve's hook for a graceful stop; a replica that failed to start has nothing to close.
        if hasattr(self, "_replica"):
            self._replica.close()
