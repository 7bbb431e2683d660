"""The decode deployment: answers requests, and orchestrates what that takes.

A thin shell around one engine. It loads what the warehouse holds, computes a short rest itself, asks a prefill
replica for a long one, decodes, streams, and commits the turn. If no prefill replica answers, or one breaks off,
decode computes alone: slower, not failed.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from cache.messages import PurgeQuery
from serving.engine.step_log import StepRecord
from serving.generation import Generation
from serving.handoff import HandoffTimeouts, PrefillPeer
from serving.protocol import GenerateRequest, TokenBatch
from serving.replica import EngineOptions, Handle, ModelInfo, Replica
from serving.token_stream import Pace


class DecodeReplica:
    """One replica of the deployment."""

    def __init__(self, options: EngineOptions, timeouts: HandoffTimeouts, prefill: Handle | None = None) -> None:
        self._replica = Replica(options)
        self._peer = PrefillPeer(self._replica, prefill, timeouts) if prefill is not None else None
        self._pace = Pace()

    def describe(self) -> ModelInfo:
        """What is served here."""
        return self._replica.info

    def stats(self) -> dict[str, float]:
        """The engine's counters."""
        return self._replica.engine.stats()

    def steps(self, since: float) -> tuple[StepRecord, ...]:
        """The engine's steps that ended after `since`, by the monotonic clock of its machine."""
        return self._replica.engine.steps.since(since)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenBatch]:
        """Stream the answer."""
        self._replica.check_model(request.fingerprint)
        generation = Generation(self._replica.engine, self._peer, self._pace, request)
        async with aclosing(generation.batches()) as batches:
            async for batch in batches:
                yield batch

    async def purge(self, query: PurgeQuery) -> int:
        """Forget what is meant; returns the number of blocks that the engine's pool held of it."""
        return await asyncio.wrap_future(self._replica.engine.purge(query))

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose engine has ended."""
        self._replica.engine.check_alive()

    def __del__(self) -> None:
        # Serve's hook for a graceful stop; a replica that failed to start has nothing to close.
        if hasattr(self, "_replica"):
            self._replica.close()
