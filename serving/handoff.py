"""Decode's side of a handoff: asks a prefill replica for a long prompt and follows its progress.

Whatever happens to the prefill replica, the engine is told that the handoff has ended, and computes what is
missing by itself.
"""

import asyncio
import logging
from dataclasses import dataclass

import ray
from ray.serve.exceptions import RayServeException

from serving.protocol import GenerateRequest, PrefillProgress, PrefillRequest
from serving.replica import Handle, Replica

logger = logging.getLogger("tokenloft.decode")


@dataclass(frozen=True, slots=True)
class HandoffTimeouts:
    """How long decode waits for a prefill replica before it goes on alone, in seconds."""

    accept_s: float
    progress_s: float


class PrefillPeer:
    """The prefill deployment as one decode replica sees it."""

    def __init__(self, replica: Replica, handle: Handle, timeouts: HandoffTimeouts) -> None:
        self._replica = replica
        self._handle = handle
        self._timeouts = timeouts
        self._tasks: set[asyncio.Task[None]] = set()

    def request(self, request: GenerateRequest, num_present: int) -> PrefillRequest | None:
        """What to ask for: the whole prompt, and the logits after it for the first token.

        Or everything but the last token, whose logits are then computed here; None if no more than that is missing
        behind the `num_present` tokens that are here.
        """
        block_size = request.fingerprint.block_size
        wants_logits = _begins_with_logits(request)
        num_tokens = len(request.token_ids) - (0 if wants_logits else 1)
        if num_present >= num_tokens:
            return None
        return PrefillRequest(
            request.request_id,
            request.token_ids[:num_tokens],
            request.fingerprint,
            request.block_hashes[: num_tokens // block_size],
            num_present // block_size,
            lease_owner=request.request_id,
            wants_logits=wants_logits,
            use_cache=request.use_cache,
            target=request.decision.prefill_replica,
            origin=request.origin,
        )

    def start(self, request: PrefillRequest) -> asyncio.Task[None]:
        """Begin the handoff; cancel the task to give it up. Called in the event loop."""
        task = asyncio.get_running_loop().create_task(self._hand_off(request))
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        return task

    async def _hand_off(self, request: PrefillRequest) -> None:
        try:
            await self._follow(request)
        except TimeoutError:
            logger.warning("no answer from prefill for %s: decode computes alone", request.request_id)
        except (ray.exceptions.RayError, RayServeException) as error:
            logger.warning("prefill failed for %s: decode computes alone (%s)", request.request_id, error)
        finally:
            self._replica.engine.handoff_closed(request.request_id)

    async def _follow(self, request: PrefillRequest) -> None:
        stream = self._handle.options(stream=True).prefill.remote(request)
        timeout_s = self._timeouts.accept_s
        try:
            while True:
                progress: PrefillProgress = await asyncio.wait_for(anext(stream), timeout_s)
                timeout_s = self._timeouts.progress_s
                if progress.logits is not None:
                    self._replica.engine.handoff_logits(request.request_id, progress.logits)
                    continue
                node_id = None if progress.node_id == self._replica.node_id else progress.node_id
                self._replica.engine.handoff_progress(request.request_id, progress.num_tokens, node_id)
                if progress.done:
                    return
        except StopAsyncIteration:
            return
        finally:
            stream.cancel()


def _begins_with_logits(request: GenerateRequest) -> bool:
    """Whether the first token can be sampled before the prompt's last blocks are here.

    Not where other choices begin with it, which look for the blocks, nor where the answer has begun elsewhere.
    """
    return len(request.choices) == 1 and not request.choices[0].generated
