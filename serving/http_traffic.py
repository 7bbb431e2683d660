"""Two thin ASGI layers around the routes: one that measures every request, one that bounds how many are in progress.

    RequestMeter -> HttpEdge -> RequestBound -> routes

The meter is outside the edge and so sees the status of every answer; the bound is inside, so that its refusal is
told in the edge's way. Both see an answer to its last byte, streamed ones too.
"""

from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http_errors import too_many_requests
from serving.http_metrics import Metrics

_BEGAN_AT = "tokenloft.began_at"

CLIENT_LEFT = 499
"""nginx's status for a client that hung up before it had an answer."""


def began_at(scope: Scope) -> float:
    """When the request arrived, on the metrics' clock."""
    return float(scope[_BEGAN_AT])


class RequestMeter:
    """Counts and times every HTTP request by endpoint."""

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str]) -> None:
        """`endpoints`: paths with a label of their own; all others share `other`."""
        self._app = app
        self._metrics = metrics
        self._endpoints = frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # Paths that clients make up must not become labels: each would be kept for ever.
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
        scope[_BEGAN_AT] = arrived_at = self._metrics.request_began(endpoint)
        try:
            await self._app(scope, receive, note_status)
        finally:
            self._metrics.request_ended(endpoint, status, arrived_at)


class RequestBound:
    """Refuses a request to one of `endpoints` while `max_requests` of them are in progress."""

    def __init__(self, app: ASGIApp, max_requests: int, endpoints: Collection[str]) -> None:
        self._app = app
        self._max_requests = max_requests
        self._endpoints = frozenset(endpoints)
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self._endpoints:
            await self._app(scope, receive, send)
            return
        # Before the body is read: refusing must be cheap, and bodies in memory are bounded with it.
        if self._num_requests >= self._max_requests:
            raise too_many_requests(self._max_requests)
        self._num_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_requests -= 1
