"""The decode deployment: answers requests, and orchestrates what that takes.

A thin shell around one engine. It loads what the warehouse holds, computes a short rest itself, asks a prefill
replica for a long one, decodes, streams, and commits the turn. If no prefill replica answers, or one breaks off,
decode computes alone: slower, not failed.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import ray
from ray.serve.exceptions import RayServeException

from serving.engine.sequence import EngineRequest, Listener, Sequence
from serving.protocol import GenerateRequest, PrefillProgress, PrefillRequest, TokenBatch
from serving.replica import EngineOptions, Handle, ModelInfo, Replica
from serving.token_stream import TokenStream

logger = logging.getLogger("tokenloft.decode")


@dataclass(frozen=True, slots=True)
class HandoffTimeouts:
    """How long decode waits for a prefill replica before it goes on alone, in seconds."""

    accept_s: float
    progress_s: float


class DecodeReplica:
    """One replica of the deployment."""

    def __init__(self, options: EngineOptions, timeouts: HandoffTimeouts, prefill: Handle | None = None) -> None:
        self._replica = Replica(options)
        self._timeouts = timeouts
        self._prefill = prefill
        self._block_size = options.block_size
        self._tasks: set[asyncio.Task[None]] = set()

    def describe(self) -> ModelInfo:
        """What is served here."""
        return self._replica.info

    def stats(self) -> dict[str, float]:
        """The engine's counters."""
        return self._replica.engine.stats()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenBatch]:
        """Stream the answer. The work stops within a step when the consumer goes away."""
        self._replica.check_model(request.fingerprint)
        stream = TokenStream()
        handoffs: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        is_over = False

        def start_handoff(prefill_request: PrefillRequest) -> None:
            if not is_over:  # the engine may ask in the moment in which the consumer goes away
                handoffs.append(self._start_handoff(prefill_request))

        def ask_prefill(sequence: Sequence) -> bool:
            if self._prefill is None:
                return False
            prefill_request = self._prefill_request(request, sequence.num_computed)
            if prefill_request is None:
                return False
            loop.call_soon_threadsafe(start_handoff, prefill_request)
            return True

        self._replica.engine.submit(
            EngineRequest(
                request.request_id,
                request.token_ids,
                request.fingerprint.root_hash(),
                request.block_hashes,
                request.sampling,
                use_cache=request.use_cache,
                reason=request.decision.reason,
            ),
            Listener(on_batch=stream.push, ask_prefill=ask_prefill),
        )
        try:
            async for batch in stream:
                yield batch
        finally:
            is_over = True
            self._replica.engine.cancel(request.request_id)
            for task in handoffs:
                task.cancel()

    def _prefill_request(self, request: GenerateRequest, num_present: int) -> PrefillRequest | None:
        """All full blocks but for the last token, whose logits are wanted here; None if no block is missing."""
        num_blocks = (len(request.token_ids) - 1) // self._block_size
        first_block = num_present // self._block_size
        if first_block >= num_blocks:
            return None
        return PrefillRequest(
            request.request_id,
            request.token_ids[: num_blocks * self._block_size],
            request.fingerprint,
            request.block_hashes[:num_blocks],
            first_block,
            lease_owner=request.request_id,
            use_cache=request.use_cache,
            target=request.decision.prefill_replica,
        )

    def _start_handoff(self, request: PrefillRequest) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(self._hand_off(request))
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        return task

    async def _hand_off(self, request: PrefillRequest) -> None:
        """Follow a prefill replica's progress; however it ends, the engine is told that it has ended."""
        try:
            await self._follow(request)
        except TimeoutError:
            logger.warning("no answer from prefill for %s: decode computes alone", request.request_id)
        except (ray.exceptions.RayError, RayServeException) as error:
            logger.warning("prefill failed for %s: decode computes alone (%s)", request.request_id, error)
        finally:
            self._replica.engine.handoff_closed(request.request_id)

    async def _follow(self, request: PrefillRequest) -> None:
        assert self._prefill is not None
        stream = self._prefill.options(stream=True).prefill.remote(request)
        timeout_s = self._timeouts.accept_s
        try:
            while True:
                progress: PrefillProgress = await asyncio.wait_for(anext(stream), timeout_s)
                timeout_s = self._timeouts.progress_s
                node_id = None if progress.node_id == self._replica.node_id else progress.node_id
                self._replica.engine.handoff_progress(request.request_id, progress.num_tokens, node_id)
                if progress.done:
                    return
        except StopAsyncIteration:
            return
        finally:
            stream.cancel()

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose engine has ended."""
        self._replica.engine.check_alive()

    def __del__(self) -> None:
        # Serve's hook for a graceful stop; a replica that failed to start has nothing to close.
        if hasattr(self, "_replica"):
            self._replica.close()
