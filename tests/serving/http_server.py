"""The HTTP edge over a real socket: uvicorn on loopback, before a scripted backend."""

import asyncio
import random
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from cache.hashing import BlockHash, TokenIds, as_token_ids
from serving.chat import ChatMessage, ChatTemplateError
from serving.http_app import build_app
from serving.http_settings import HttpSettings
from serving.protocol import SamplingParams, TokenBatch, TokenLogprob, Usage
from serving.tool_calls import Tool
from serving.vocabulary import TokenPiece

MAX_MODEL_LEN = 64
VOCAB_SIZE = 100
WAIT_S = 20
ENDLESS, SILENT = "endless", "silent"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "one two three"}]}
CHAT = "/v1/chat/completions"
TEXT_BODY: dict[str, Any] = {"model": "tiny", "prompt": "one two three"}
TEXT = "/v1/completions"


@dataclass
class ScriptedBackend:
    """A backend of one token per word, its length, which streams a fixed answer, the same for every choice.

    Tokens 1, 2 and so on of the vocabulary are the texts of the answer.
    """

    texts: tuple[str, ...] = ("Hello", ", ", "wörld")
    script: str = ""
    """ENDLESS: the answer never ends. SILENT: it never begins."""
    failure: Exception | None = None
    """Raised after `texts`."""
    ready: bool = True
    stats: Mapping[str, Any] = field(default_factory=lambda: {"num_blocks": 3})
    calls: list[dict[str, Any]] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    """Ends an ENDLESS answer."""
    model_name: str = "tiny"
    max_model_len: int = MAX_MODEL_LEN
    vocab_size: int = VOCAB_SIZE
    created: int = 1_700_000_000

    def is_ready(self) -> bool:
        return self.ready

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> TokenIds:
        if messages[-1].role == "assistant":
            raise ChatTemplateError("the assistant must not speak last")
        return self.tokenize(" ".join(message.content for message in messages))

    def tokenize(self, text: str) -> TokenIds:
        return as_token_ids([len(word) for word in text.split()])

    def recall(self, token_ids: TokenIds, tenant: str) -> TokenIds:
        return token_ids

    def decode_tokens(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{token_id}>" for token_id in token_ids)

    def token_piece(self, token_id: int) -> TokenPiece:
        if 1 <= token_id <= len(self.texts):
            return TokenPiece(self.texts[token_id - 1].encode())
        return TokenPiece(f"<{token_id}>".encode())

    async def generate(
        self,
        token_ids: TokenIds,
        sampling: SamplingParams,
        session_id: str | None,
        use_cache: bool,
        request_id: str,
        num_choices: int,
        tenant: str,
    ) -> AsyncGenerator[TokenBatch, None]:
        self.calls.append(
            {
                "token_ids": token_ids.tolist(),
                "sampling": sampling,
                "session_id": session_id,
                "use_cache": use_cache,
                "request_id": request_id,
                "num_choices": num_choices,
                "tenant": tenant,
            }
        )
        self.begun.set()
        try:
            if self.script == SILENT:
                await asyncio.Event().wait()
            for number, text in enumerate(self.texts, 1):
                for choice in range(num_choices):
                    yield TokenBatch((number,), text, choice=choice, logprobs=self._logprobs(number, sampling))
            while self.script == ENDLESS and not self.released.is_set():
                await asyncio.sleep(0.005)
                yield TokenBatch((1,), "more ")
            if self.failure is not None:
                raise self.failure
            usage = Usage(prompt_tokens=len(token_ids), completion_tokens=len(self.texts), device_tokens=2)
            for choice in range(num_choices):
                yield TokenBatch((), "", "stop", usage, choice)
        finally:
            await asyncio.sleep(0.001)  # a real backend tells its engine
            self.closed.set()

    def _logprobs(self, token_id: int, sampling: SamplingParams) -> tuple[TokenLogprob, ...]:
        if sampling.num_logprobs is None:
            return ()
        top = tuple((token_id + i, -0.5 - i) for i in range(sampling.num_logprobs))
        return (TokenLogprob(token_id, -0.5, top),)

    async def purge(self, tenant: str, session_id: str | None, root_hash: BlockHash | None) -> Mapping[str, Any]:
        self.calls.append({"tenant": tenant, "session_id": session_id, "root_hash": root_hash})
        if self.failure is not None:
            raise self.failure
        return {"num_blocks": 3, "num_left": 0}

    async def warehouse_stats(self) -> Mapping[str, Any]:
        return self.stats


@contextmanager
def serving(backend: ScriptedBackend, settings: HttpSettings | None = None) -> Iterator[str]:
    """The base URL of a server before `backend`."""
    with serving_app(build_app(backend, settings, clock=lambda: 42.5, rng=random.Random(1))) as url:
        yield url


@contextmanager
def serving_app(app: FastAPI) -> Iterator[str]:
    """The base URL of a server of `app`."""
    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=WAIT_S)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()


@contextmanager
def client_of(backend: ScriptedBackend, settings: HttpSettings | None = None) -> Iterator[httpx.Client]:
    with serving(backend, settings) as url, httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client:
        yield client


def but(**fields: Any) -> dict[str, Any]:
    """A chat request with `fields`."""
    return {"json": {**BODY, **fields}}
