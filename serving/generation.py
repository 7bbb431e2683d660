"""One request on a decode replica: its choices, its handoff, its end.

The first choice goes to the engine at once, the others when it has its first token: then the prompt's blocks are
in the pool, and all choices share them.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from serving.engine.engine import Engine
from serving.engine.sequence import EngineRequest, Listener, Sequence
from serving.handoff import PrefillPeer
from serving.protocol import Choice, GenerateRequest, PrefillRequest, TokenBatch
from serving.token_stream import Pace, TokenStream


class Generation:
    """See the module's docstring. Made in the event loop; the engine calls back from its own thread."""

    def __init__(self, engine: Engine, peer: PrefillPeer | None, pace: Pace, request: GenerateRequest) -> None:
        self._engine = engine
        self._peer = peer
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._stream = TokenStream(pace, num_choices=len(request.choices))
        self._waiting = list(request.choices[1:])
        self._handoff: asyncio.Task[None] | None = None
        self._is_over = False

    async def batches(self) -> AsyncGenerator[TokenBatch, None]:
        """All choices' batches as they come. The work stops within a step when the consumer goes away."""
        try:
            self._submit(self._request.choices[0], ask_prefill=True)
            async for batch in self._stream:
                yield batch
        finally:
            self._is_over = True
            for choice in self._request.choices:
                self._engine.cancel(self._engine_id(choice))
            if self._handoff is not None:
                self._handoff.cancel()

    def _engine_id(self, choice: Choice) -> str:
        """The first choice has the request's own id, which its handoff goes by."""
        is_first = choice is self._request.choices[0]
        return self._request.request_id if is_first else f"{self._request.request_id}/{choice.index}"

    def _submit(self, choice: Choice, *, ask_prefill: bool) -> None:
        request = self._request

        def on_batch(batch: TokenBatch) -> None:
            self._stream.push(replace(batch, choice=choice.index))
            while self._waiting and not self._is_over:
                self._submit(self._waiting.pop(0), ask_prefill=False)

        self._engine.submit(
            EngineRequest(
                self._engine_id(choice),
                request.token_ids,
                request.fingerprint.root_hash(),
                request.block_hashes,
                replace(request.sampling, seed=request.sampling.seed + choice.index),
                use_cache=request.use_cache,
                num_choices=len(request.choices),
                generated=choice.generated,
                reason=request.decision.reason,
                origin=request.origin,
            ),
            Listener(on_batch, ask_prefill=self._ask_prefill if ask_prefill and self._peer else None),
        )
        if self._is_over:  # the consumer went away in between, and has cancelled what there was
            self._engine.cancel(self._engine_id(choice))

    def _ask_prefill(self, sequence: Sequence) -> bool:
        assert self._peer is not None
        request = self._peer.request(self._request, sequence.num_computed)
        if request is None:
            return False
        self._loop.call_soon_threadsafe(self._start_handoff, request)
        return True

    def _start_handoff(self, request: PrefillRequest) -> None:
        assert self._peer is not None
        if not self._is_over:  # the engine may ask in the moment in which the consumer goes away
            self._handoff = self._peer.start(request)
