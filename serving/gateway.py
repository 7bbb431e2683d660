"""The gateway: HTTP in, decisions, answers out. Serve's ingress deployment.

Renders the chat template, tokenises once, hashes the blocks, lets the router decide, and streams back what the
chosen decode replica says. It holds no KV and no model; it mirrors the node stores' events to know where blocks
are.
"""

import asyncio
import dataclasses
import logging
import random
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import RayServeException

from cache.actor import PURGE_TIMEOUT_S, RayStorePort
from cache.errors import StoreUnavailable
from cache.extent import Origin
from cache.fingerprint import Fingerprint
from cache.hashing import BlockHash, TokenIds, chain_hashes
from cache.messages import PurgeQuery, PurgeReceipt
from router.cost import CostModel
from router.gateway_router import Router
from router.mirror import Mirror
from router.policy import PolicyConfig, RouteRequest
from serving.answer_memory import AnswerMemory
from serving.chat import ChatMessage, ChatTemplate
from serving.http_app import build_app
from serving.http_errors import ApiError, purge_incomplete
from serving.http_settings import HttpSettings
from serving.protocol import GenerateRequest, SamplingParams, TokenBatch
from serving.relay import Delivered, ReplicaLost, relay
from serving.replica import Handle, ModelInfo
from serving.tenants import label_of, salt_of
from serving.tool_calls import Tool
from serving.vocabulary import TokenPiece

logger = logging.getLogger("tokenloft.gateway")

EVENT_WAIT_S = 5.0
"""A reader of events waits this long for news; also how often a quiet node store is heard of."""
STORE_RETRY_S = 1.0
MAX_ATTEMPTS = 3
"""Replicas that may fail on one request before the client hears of it."""


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What the gateway needs to know before the model has come up."""

    model_name: str
    model_dir: Path
    cache_enabled: bool
    http: HttpSettings
    policy: PolicyConfig
    prediction_ttl_s: float
    node_ids: tuple[str, ...]
    """Nodes with a node store."""
    share_cache_between_keys: bool = False


@serve.ingress()
class Gateway:
    """The ingress replica, and the backend behind `http_app`."""

    def __init__(self, options: GatewayOptions, decode: Handle, prefill: Handle | None) -> None:
        self._options = options
        self._decode = decode
        self._prefill = prefill
        self._template = ChatTemplate.load(options.model_dir)
        self._answers = AnswerMemory(self._template.vocabulary)
        self._mirror = Mirror(time.monotonic, prediction_ttl_s=options.prediction_ttl_s)
        self._ports = [RayStorePort(node_id) for node_id in options.node_ids]
        self._info: ModelInfo | None = None
        self._router: Router | None = None
        self._created = int(time.time())

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once in the replica: the app answers only when a decode replica does."""
        info: ModelInfo = await self._decode.describe.remote()
        costs = CostModel(bytes_per_token=info.kv_bytes_per_token)
        self._router = Router(self._mirror, costs, self._options.policy, random.Random())
        for port in self._ports:
            threading.Thread(target=follow_events, args=(port, self._router), daemon=True).start()
        self._info = info
        return build_app(self, self._options.http)

    @property
    def _model(self) -> ModelInfo:
        if self._info is None:
            raise RuntimeError("the model is not ready")
        return self._info

    # -- what http_app asks for ---------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        return self._options.model_name

    @property
    def max_model_len(self) -> int:
        return self._model.max_request_tokens

    @property
    def vocab_size(self) -> int:
        return self._template.vocabulary.size

    @property
    def created(self) -> int:
        return self._created

    def is_ready(self) -> bool:
        return self._info is not None

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> TokenIds:
        return self._template.render(messages, tools)

    def tokenize(self, text: str) -> TokenIds:
        return self._template.vocabulary.tokenize(text)

    def recall(self, token_ids: TokenIds, tenant: str) -> TokenIds:
        return self._answers.recall(token_ids, tenant)

    def decode_tokens(self, token_ids: Sequence[int]) -> str:
        return self._template.vocabulary.decode(token_ids)

    def token_piece(self, token_id: int) -> TokenPiece:
        return self._template.vocabulary.piece(token_id)

    def generate(
        self,
        token_ids: TokenIds,
        sampling: SamplingParams,
        session_id: str | None,
        use_cache: bool,
        request_id: str,
        num_choices: int = 1,
        tenant: str = "",
    ) -> AsyncGenerator[TokenBatch, None]:
        """The answers to one prompt; what they were made of is remembered."""
        batches = self._route(token_ids, sampling, session_id, use_cache, request_id, num_choices, tenant)
        return self._answers.hear(batches, token_ids, tenant)

    async def _route(
        self,
        token_ids: TokenIds,
        sampling: SamplingParams,
        session_id: str | None,
        use_cache: bool,
        request_id: str,
        num_choices: int,
        tenant: str,
    ) -> AsyncGenerator[TokenBatch, None]:
        """Route the request and relay its answer, past replicas that fail on the way."""
        assert self._router is not None
        use_cache = use_cache and self._options.cache_enabled
        fingerprint = self._fingerprint(request_id, tenant, use_cache=use_cache)
        hashes = tuple(chain_hashes(fingerprint.root_hash(), token_ids, fingerprint.block_size))
        route = RouteRequest(len(token_ids), hashes, fingerprint.block_size, session_id)
        delivered = Delivered(num_choices)
        for attempt in range(MAX_ATTEMPTS):
            with self._router.route(route) as reservation:
                request = GenerateRequest(
                    f"{request_id}.{attempt}",
                    token_ids,
                    fingerprint,
                    hashes,
                    sampling,
                    reservation.decision,
                    use_cache,
                    delivered.open_choices(),
                    Origin(label_of(tenant), session_id or ""),
                )
                try:
                    async with aclosing(relay(self._decode, request)) as batches:
                        async for batch in batches:
                            reservation.prefilled()
                            delivered.note(batch)
                            yield self._with_savings(batch)
                    return
                except ReplicaLost as lost:
                    if not delivered.open_choices():
                        return  # the client has it all; only the end of the stream was lost
                    logger.warning("%s lost its replica (%s): going on with another one", request_id, lost)
            if reservation.decision.decode_replica is not None:
                self._router.forget_replica(reservation.decision.decode_replica)
        message = f"{MAX_ATTEMPTS} replicas failed on this request; please try again."
        raise ApiError(503, message, code="replica_failed", headers={"retry-after": "1"})

    def _fingerprint(self, request_id: str, tenant: str, *, use_cache: bool) -> Fingerprint:
        """What the request's hashes are rooted in."""
        if not use_cache:
            # A root that nobody else has: nothing can be found under it, and the handoff works as ever.
            salt = f"uncached:{request_id}"
        else:
            salt = "" if self._options.share_cache_between_keys else salt_of(tenant)
        return replace(self._model.fingerprint, tenant_salt=salt)

    def _with_savings(self, batch: TokenBatch) -> TokenBatch:
        usage = batch.usage
        if usage is None or self._router is None:
            return batch
        saved_s = max(0.0, self._router.seconds_to_compute(usage.cached_tokens) - usage.load_s)
        return replace(batch, usage=replace(usage, saved_s=saved_s))

    async def purge(self, tenant: str, session_id: str | None, root_hash: BlockHash | None) -> Mapping[str, Any]:
        """Delete everywhere. The engines come twice: they may have loaded some of it before the stores deleted it."""
        query = PurgeQuery(label_of(tenant), session_id, root_hash)
        num_device_blocks = await self._purge_engines(query)
        receipt = PurgeReceipt.sum_of(
            await asyncio.gather(*(asyncio.to_thread(_purge_store, port, query) for port in self._ports))
        )
        num_device_blocks += await self._purge_engines(query)
        # Ids of answers say what was said, too. They are not kept by session: forgetting more costs time alone.
        num_answers = self._answers.forget(tenant) if root_hash is None else 0
        return dataclasses.asdict(receipt) | {"num_device_blocks": num_device_blocks, "num_answers": num_answers}

    async def _purge_engines(self, query: PurgeQuery) -> int:
        """Number of blocks that the engines' pools held. Raises ApiError if one does not answer."""
        num_blocks = 0
        for handle in (self._decode, self._prefill):
            if handle is None:
                continue
            try:
                num_blocks += sum(await handle.broadcast("purge", query).results_async(timeout_s=PURGE_TIMEOUT_S))
            except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
                raise purge_incomplete("an engine") from error
        return num_blocks

    async def warehouse_stats(self) -> Mapping[str, Any]:
        """State of each node store, and the engines' counters."""
        stores = await asyncio.gather(*(asyncio.to_thread(_store_stats, port) for port in self._ports))
        return {"stores": stores, "engines": await self._engine_stats()}

    async def _engine_stats(self) -> Mapping[str, Any]:
        answers: dict[str, Any] = {}
        for role, handle in (("decode", self._decode), ("prefill", self._prefill)):
            if handle is not None:
                answers[role] = await _broadcast_stats(handle)
        return answers


async def _broadcast_stats(handle: Handle) -> Any:
    try:
        return await handle.broadcast("stats").results_async(timeout_s=10.0)
    except (ray.exceptions.RayError, RayServeException, TimeoutError) as error:
        return f"unavailable: {error}"


def _purge_store(port: RayStorePort, query: PurgeQuery) -> PurgeReceipt:
    try:
        return port.purge(query)
    except StoreUnavailable as error:
        raise purge_incomplete(f"the node store of {port.node_id}") from error


def _store_stats(port: RayStorePort) -> Mapping[str, Any]:
    try:
        return dataclasses.asdict(port.stats())
    except StoreUnavailable as error:
        return {"node_id": port.node_id, "state": f"unavailable: {error}"}


def follow_events(port: RayStorePort, router: Router) -> None:
    """Mirror one node store for as long as the process lives; a store that is away is asked again."""
    while True:
        epoch, number = router.position(port.node_id)
        try:
            router.apply(port.read_events(epoch, number, EVENT_WAIT_S))
        except StoreUnavailable:
            time.sleep(STORE_RETRY_S)
