"""The outermost layer of the HTTP edge: request ids, the last catch of every error, and clients that hang up.

`HttpEdge` wraps the whole app and holds the one broad `except` of the edge: whatever escapes a route becomes an
answer in OpenAI's shape, or an error event if a stream has begun, and never a traceback to the client.
`run_while_connected` ends work as soon as its client has gone; plain asyncio throughout, so that a cancelled
generator may still await in its own clean-up. Knows nothing of completions.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http_errors import ApiError, body_too_large, internal_error

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REQUEST_ID = "tokenloft.request_id"
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def request_id_of(request: Request) -> str:
    """The server's own id of the request: unique, whatever the client sent as `x-request-id`."""
    return str(request.scope[_REQUEST_ID])


def sse_event(data: bytes) -> bytes:
    """One server-sent event; `data` has no line break."""
    return b"data: " + data + b"\n\n"


class HttpEdge:
    """ASGI middleware around everything else.

    The answer's `x-request-id` echoes the client's where it is a plain word and is the server's own id
    otherwise; inside, only the server's own is used, because two clients may send the same.
    """

    def __init__(self, app: ASGIApp, new_request_id: Callable[[], str]) -> None:
        self._app = app
        self._new_request_id = new_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_REQUEST_ID] = request_id = self._new_request_id()
        answer = _Answer(send, _echo(Headers(scope=scope), request_id))
        try:
            await self._app(scope, receive, answer.send)
        except ClientDisconnect:
            return
        except ApiError as error:
            await answer.fail(error, scope, receive)
        except Exception:
            logger.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            await answer.fail(internal_error(request_id), scope, receive)


class _Answer:
    """How far the answer to one request has got, so that an error can still be told."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self._is_started = False
        self._is_event_stream = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            self._is_started = True
            self._is_event_stream = headers.get("content-type", "").startswith(EventStream.media_type)
        await self._send(message)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Tell the client of `error` in the way that is still open."""
        if not self._is_started:
            await error.response()(scope, receive, self.send)
        elif self._is_event_stream:
            await self._send({"type": "http.response.body", "body": sse_event(error.body()), "more_body": False})
        # Else half an answer is out and nothing in its format can take it back: the server closes the connection.


class EventStream(StreamingResponse):
    """Server-sent events from an async generator, which is closed when the client has gone.

    The status is sent with the first event, so that a failure before it still gets a status of its own.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(events, headers={**_STREAM_HEADERS, **(headers or {})})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_while_connected(self._send_events(send), receive)

    async def _send_events(self, send: Send) -> None:
        is_started = False
        async with aclosing(self._events) as events:
            async for event in events:
                if not is_started:
                    await _send_or_leave(send, self._start())
                    is_started = True
                await _send_or_leave(send, {"type": "http.response.body", "body": event, "more_body": True})
        await _send_or_leave(send, {"type": "http.response.body", "body": b"", "more_body": False})

    def _start(self) -> Message:
        return {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}


async def run_while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Run `work` to its end, or cancel it and raise ClientDisconnect when the client hangs up first.

    The request's body must have been read. Returns only after `work` has finished its clean-up.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        was_cut_short = not working.done()
        working.cancel()
        watching.cancel()
        outcome, _ = await asyncio.gather(working, watching, return_exceptions=True)
        if was_cut_short and isinstance(outcome, Exception):
            logger.warning("clean-up failed after a client had gone", exc_info=outcome)


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """The whole body, or ApiError 413 as soon as it is known to be larger than `max_body_bytes`."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_body_bytes:
        raise body_too_large(max_body_bytes)
    body = bytearray()
    async for piece in request.stream():
        if len(body) + len(piece) > max_body_bytes:
            raise body_too_large(max_body_bytes)
        body += piece
    return bytes(body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_or_leave(send: Send, message: Message) -> None:
    try:
        await send(message)
    except OSError as error:  # how ASGI servers of spec 2.4 and later say that the client has gone
        raise ClientDisconnect from error


def _echo(headers: Headers, request_id: str) -> str:
    sent = headers.get("x-request-id", "")
    return sent if _SANE_ID.fullmatch(sent) else request_id
