"""From a decode replica to the client: what has been delivered, and what to do when the replica fails.

A replica that dies, or whose engine has ended, is not the client's business: the request goes on at another one,
behind the tokens that were delivered, from the warehouse where it has the blocks and by recompute where not.
"""

from collections.abc import AsyncGenerator
from logging import getLogger

import ray
from ray.serve.exceptions import BackPressureError, RayServeException

from serving.engine.engine import EngineStopped, RequestTooLong
from serving.http_errors import ApiError, overloaded
from serving.protocol import Choice, GenerateRequest, TokenBatch
from serving.replica import Handle

logger = getLogger("tokenloft.gateway")


class ReplicaLost(Exception):
    """The replica can't finish the request; another one can."""


class Delivered:
    """What the client has of each choice."""

    def __init__(self, num_choices: int) -> None:
        self._open: dict[int, list[int]] = {index: [] for index in range(num_choices)}

    def __repr__(self) -> str:
        return f"<Delivered { ({index: len(tokens) for index, tokens in self._open.items()}) }>"

    def note(self, batch: TokenBatch) -> None:
        """A batch goes out to the client."""
        if batch.finish_reason is not None:
            self._open.pop(batch.choice, None)
        elif batch.choice in self._open:
            self._open[batch.choice] += batch.token_ids

    def open_choices(self) -> tuple[Choice, ...]:
        """The choices that are not finished, and how far each has come."""
        return tuple(Choice(index, tuple(tokens)) for index, tokens in self._open.items())


async def relay(decode: Handle, request: GenerateRequest) -> AsyncGenerator[TokenBatch, None]:
    """One attempt. Raises ReplicaLost if another replica should go on, ApiError if the client should hear of it."""
    stream = decode.options(stream=True).generate.remote(request)
    try:
        async for batch in stream:
            if batch.finish_reason == "lost":
                raise ReplicaLost(batch.text)
            if batch.finish_reason == "error":
                logger.error("the engine failed on %s: %s", request.request_id, batch.text)
                raise ApiError(500, "The engine failed on this request.", code="engine_error")
            yield batch
    except BackPressureError as error:
        raise overloaded("Too many requests wait already; please try again.") from error
    except RequestTooLong as error:
        raise ApiError(400, str(error), param="max_tokens", code="context_length_exceeded") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error, EngineStopped) or isinstance(error.cause, EngineStopped):
            raise ReplicaLost("its engine has ended") from error
        raise
    except (ray.exceptions.RayError, RayServeException) as error:
        raise ReplicaLost(f"{type(error).__name__}") from error
    finally:
        stream.cancel()
