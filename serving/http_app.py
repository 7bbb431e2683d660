"""The OpenAI-compatible HTTP API over a `Backend`: validate, render, generate, stream back.

    POST /v1/chat/completions    GET /v1/models    GET /v1/models/{id}    GET /health    GET /warehouse/stats

Extensions: the header `x-session-id` names the conversation, the body's `tokenloft` object holds options of
ours (`{"cache": false}`), and the answer's `usage.tokenloft` says where the prompt's KV came from.
Never knows Ray, engines or routing. Bodies are read and parsed here, not by FastAPI, because its own errors
have another shape; so there is no generated schema page either.
"""

import asyncio
import hashlib
import hmac
import random
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cache.hashing import TokenIds
from serving.chat import ChatMessage, ChatTemplateError
from serving.completion import Completion
from serving.http_edge import EventStream, HttpEdge, read_body, request_id_of, run_while_connected
from serving.http_errors import (
    ApiError,
    answer_framework_validation,
    answer_http_exception,
    answer_too_long,
    from_pydantic,
    invalid_api_key,
    malformed_json,
    model_not_found,
    model_not_ready,
    prompt_too_long,
    unsupported_content_type,
    unsupported_parameter,
)
from serving.openai_schema import ChatCompletionRequest, ModelCard, ModelList
from serving.protocol import SamplingParams, TokenBatch

_SESSION_ID = re.compile(r"[\x21-\x7e]{1,256}", re.ASCII)


class Backend(Protocol):
    """What answers behind the HTTP edge. Any method may raise ApiError to tell the client something specific."""

    @property
    def model_name(self) -> str: ...

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and answer share."""

    @property
    def created(self) -> int:
        """When the model came up, in seconds since the epoch."""

    def is_ready(self) -> bool:
        """True once the model answers."""

    def render(self, messages: Sequence[ChatMessage]) -> TokenIds:
        """The prompt's token ids, `(num_tokens,)`. Called from worker threads. Raises ChatTemplateError."""

    def generate(
        self, token_ids: TokenIds, sampling: SamplingParams, session_id: str | None, use_cache: bool, request_id: str
    ) -> AsyncGenerator[TokenBatch, None]:
        """The answer, in batches; the last has a `finish_reason` and `usage`.

        The generator is closed, or cancelled at its await, as soon as the client hangs up.
        """

    async def warehouse_stats(self) -> Mapping[str, Any]:
        """What the warehouse holds, as JSON values."""


@dataclass(frozen=True)
class HttpSettings:
    """Limits and keys of the HTTP edge."""

    max_body_bytes: int = 16 * 2**20
    api_key_hashes: frozenset[bytes] = frozenset()
    """From `hash_api_key`; empty: no key is asked for. `/health` never asks for one."""
    retry_after_s: int = 5
    """What a client is told to wait while the model is not ready."""


def hash_api_key(key: str) -> bytes:
    """The form in which keys are kept and compared."""
    return hashlib.sha256(key.encode("utf-8")).digest()


def build_app(
    backend: Backend,
    settings: HttpSettings | None = None,
    *,
    clock: Callable[[], float] = time.time,
    rng: random.Random | None = None,
) -> FastAPI:
    """The ASGI app. It has no state beside `backend` and no lifespan, so it can be mounted anywhere.

    `clock` gives seconds since the epoch; `rng` gives request ids and the seeds of requests without one.
    """
    settings = settings or HttpSettings()
    rng = rng or random.SystemRandom()
    app = FastAPI(
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            HTTPException: answer_http_exception,
            RequestValidationError: answer_framework_validation,
        },
    )
    app.add_middleware(HttpEdge, new_request_id=lambda: f"{rng.getrandbits(128):032x}")
    app.include_router(_open_routes(backend))
    app.include_router(_guarded_routes(backend, settings, ChatCompletions(backend, settings, clock, rng)))
    return app


def _open_routes(backend: Backend) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        is_ready = backend.is_ready()
        state = {"status": "ok" if is_ready else "starting", "model": backend.model_name}
        return JSONResponse(state, 200 if is_ready else 503)

    return routes


def _guarded_routes(backend: Backend, settings: HttpSettings, chat: "ChatCompletions") -> APIRouter:
    async def require_api_key(request: Request) -> None:
        if settings.api_key_hashes and not _has_known_key(request, settings.api_key_hashes):
            raise invalid_api_key()

    routes = APIRouter(dependencies=[Depends(require_api_key)])

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat.answer(request)

    @routes.get("/v1/models")
    async def list_models() -> Response:
        return _json(ModelList(object="list", data=[_model_card(backend)]).as_json())

    @routes.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        _check_model(model_id, backend)
        return _json(_model_card(backend).as_json())

    @routes.get("/warehouse/stats")
    async def warehouse_stats() -> Response:
        return JSONResponse(dict(await backend.warehouse_stats()))

    return routes


@dataclass(frozen=True)
class ChatCompletions:
    """`POST /v1/chat/completions`."""

    backend: Backend
    settings: HttpSettings
    clock: Callable[[], float]
    rng: random.Random

    async def answer(self, request: Request) -> Response:
        """The whole road of one request. Raises ApiError for whatever the client did wrong."""
        asked = await self._read(request)
        session_id = _session_id(request)
        token_ids = await self._render(asked)
        sampling = asked.sampling(self._max_tokens(asked, len(token_ids)), self.rng.getrandbits(63))
        request_id = request_id_of(request)
        batches = self.backend.generate(token_ids, sampling, session_id, asked.use_cache, request_id)
        completion = Completion(f"chatcmpl-{request_id}", int(self.clock()), self.backend.model_name)
        if asked.stream:
            return EventStream(completion.events(batches, asked.include_usage))
        return _json((await run_while_connected(completion.collect(batches), request.receive)).as_json())

    async def _read(self, request: Request) -> ChatCompletionRequest:
        _check_content_type(request.headers.get("content-type", ""))
        asked = _parse(await read_body(request, self.settings.max_body_bytes))
        _check_model(asked.model, self.backend)
        param = asked.unsupported_parameter()
        if param is not None:
            raise unsupported_parameter(param)
        if not self.backend.is_ready():
            raise model_not_ready(self.settings.retry_after_s)
        return asked

    async def _render(self, asked: ChatCompletionRequest) -> TokenIds:
        # In a thread: a long history takes long enough to tokenise to hold up every other stream.
        try:
            return await asyncio.to_thread(self.backend.render, asked.chat_messages())
        except ChatTemplateError as error:
            raise ApiError(400, str(error), param="messages", code="chat_template_error") from error

    def _max_tokens(self, asked: ChatCompletionRequest, num_tokens: int) -> int:
        """The client's bound where it fits, the rest of the context where there is none."""
        left = self.backend.max_model_len - num_tokens
        if left < 1:
            raise prompt_too_long(num_tokens, self.backend.max_model_len)
        if asked.requested_max_tokens is None:
            return left
        param, max_tokens = asked.requested_max_tokens
        if max_tokens > left:
            raise answer_too_long(param, max_tokens, num_tokens, self.backend.max_model_len)
        return max_tokens


def _parse(body: bytes) -> ChatCompletionRequest:
    try:
        parsed = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise malformed_json(str(error)) from error
    try:
        return ChatCompletionRequest.model_validate(parsed)
    except ValidationError as error:
        raise from_pydantic(error, parsed) from error


def _check_content_type(content_type: str) -> None:
    # Insisting on JSON also keeps web pages out: a browser asks first before it sends JSON to another site.
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise unsupported_content_type(content_type)


def _check_model(model: str, backend: Backend) -> None:
    if model != backend.model_name:
        raise model_not_found(model, backend.model_name)


def _session_id(request: Request) -> str | None:
    session_id = request.headers.get("x-session-id", "")
    if session_id and not _SESSION_ID.fullmatch(session_id):
        message = "'x-session-id' must be 1 to 256 printable ASCII characters without spaces."
        raise ApiError(400, message, param="x-session-id", code="invalid_value")
    return session_id or None


def _has_known_key(request: Request, known: frozenset[bytes]) -> bool:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    # Starlette decodes headers as latin-1; this gives back the bytes that came. Every known key is compared,
    # so that the time taken says nothing about which one came close.
    presented = hashlib.sha256(key.strip().encode("latin-1")).digest()
    matches = [hmac.compare_digest(presented, one) for one in known]
    return scheme.lower() == "bearer" and any(matches)


def _model_card(backend: Backend) -> ModelCard:
    return ModelCard(
        id=backend.model_name,
        object="model",
        created=backend.created,
        owned_by="tokenloft",
        max_model_len=backend.max_model_len,
    )


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
