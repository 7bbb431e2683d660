"""The OpenAI-compatible HTTP API over a `Backend`: validate, render, generate, stream back.

    POST /v1/chat/completions    GET /v1/models    GET /v1/models/{id}    GET /warehouse/stats
    POST /v1/completions         GET /health       GET /metrics             POST /warehouse/purge

Extensions: the header `x-session-id` names the conversation, the body's `tokenloft` object holds options of
ours (`{"cache": false}`), and the answer's `usage.tokenloft` says where the prompt's KV came from.
Where API keys are set, all but `/health` ask for one, `/metrics` too: it tells about other people's traffic.
Never knows Ray, engines or routing. There is no generated schema page, because bodies are not parsed by FastAPI.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.backend import Backend
from serving.http_chat import CHAT_PATH, ChatEndpoint
from serving.http_completions import COMPLETIONS_PATH, CompletionsEndpoint
from serving.http_edge import HttpEdge
from serving.http_errors import answer_framework_validation, answer_http_exception, invalid_api_key
from serving.http_generation import Generation, check_model
from serving.http_metrics import Metrics
from serving.http_settings import HttpSettings
from serving.http_traffic import RequestBound, RequestMeter
from serving.http_warehouse import PURGE_PATH, PurgeEndpoint
from serving.openai_schema import ModelCard, ModelList
from serving.warehouse_metrics import warehouse_metrics

STATS_TIMEOUT_S = 5.0
"""Prometheus gives a scrape ten seconds: without the warehouse's part it still gets the rest."""

_GENERATING = (CHAT_PATH, COMPLETIONS_PATH)
_ENDPOINTS = (*_GENERATING, "/v1/models", "/health", "/warehouse/stats", PURGE_PATH, "/metrics")


def build_app(
    backend: Backend,
    settings: HttpSettings | None = None,
    *,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    rng: random.Random | None = None,
) -> FastAPI:
    """The ASGI app. It has no state beside `backend` but its metrics, and no lifespan: it can be mounted anywhere.

    `clock` gives seconds since the epoch, `monotonic` seconds for measuring; `rng` gives request ids and the seeds
    of requests without one.
    """
    settings = settings or HttpSettings()
    rng = rng or random.SystemRandom()
    metrics = Metrics(monotonic)
    app = FastAPI(
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            HTTPException: answer_http_exception,
            RequestValidationError: answer_framework_validation,
        },
    )
    # The last one added is the outermost.
    app.add_middleware(RequestBound, max_requests=settings.max_requests, endpoints=_GENERATING)
    app.add_middleware(HttpEdge, new_request_id=lambda: f"{rng.getrandbits(128):032x}")
    app.add_middleware(RequestMeter, metrics=metrics, endpoints=_ENDPOINTS)
    app.include_router(_open_routes(backend))
    guarded = APIRouter(dependencies=[Depends(_key_check(settings))])
    _add_generating_routes(guarded, Generation(backend, settings, metrics, clock, rng))
    _add_model_routes(guarded, backend)
    _add_observing_routes(guarded, backend, metrics)
    _add_purge_route(guarded, PurgeEndpoint(backend, settings))
    app.include_router(guarded)
    return app


def _open_routes(backend: Backend) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        is_ready = backend.is_ready()
        state = {"status": "ok" if is_ready else "starting", "model": backend.model_name}
        return JSONResponse(state, 200 if is_ready else 503)

    return routes


def _key_check(settings: HttpSettings) -> Callable[[Request], Any]:
    async def require_api_key(request: Request) -> None:
        if not settings.accepts(request.headers.get("authorization", "")):
            raise invalid_api_key()

    return require_api_key


def _add_generating_routes(routes: APIRouter, generation: Generation) -> None:
    chat, completions = ChatEndpoint(generation), CompletionsEndpoint(generation)

    @routes.post(CHAT_PATH)
    async def chat_completions(request: Request) -> Response:
        return await chat.answer(request)

    @routes.post(COMPLETIONS_PATH)
    async def text_completions(request: Request) -> Response:
        return await completions.answer(request)


def _add_model_routes(routes: APIRouter, backend: Backend) -> None:
    @routes.get("/v1/models")
    async def list_models() -> Response:
        return _json(ModelList(object="list", data=[_model_card(backend)]).as_json())

    @routes.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        check_model(model_id, backend)
        return _json(_model_card(backend).as_json())


def _add_observing_routes(routes: APIRouter, backend: Backend, metrics: Metrics) -> None:
    @routes.get("/warehouse/stats")
    async def warehouse_stats() -> Response:
        return JSONResponse(dict(await backend.warehouse_stats()))

    @routes.get("/metrics")
    async def prometheus() -> Response:
        stats: Mapping[str, Any] = {}
        if backend.is_ready():
            with contextlib.suppress(TimeoutError):
                stats = await asyncio.wait_for(backend.warehouse_stats(), STATS_TIMEOUT_S)
        return Response(metrics.text(warehouse_metrics(stats)), media_type=CONTENT_TYPE_LATEST)


def _add_purge_route(routes: APIRouter, endpoint: PurgeEndpoint) -> None:
    @routes.post(PURGE_PATH)
    async def purge(request: Request) -> Response:
        return await endpoint.answer(request)


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
