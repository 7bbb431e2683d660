"""Two turns over HTTP, with a real engine behind: the second reuses the KV of all that the first has said.

The whole way of a request but Ray and the router. Answers are drawn from a few bytes that the tokenizer would join.
"""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cache.fingerprint import Fingerprint
from cache.hashing import BlockHash, TokenIds, as_token_ids, chain_hashes
from router.policy import Decision
from serving.answer_memory import AnswerMemory
from serving.chat import ChatMessage, ChatTemplate
from serving.engine.engine import Engine
from serving.generation import Generation
from serving.http_app import build_app
from serving.http_settings import HttpSettings, hash_api_key
from serving.protocol import Choice, GenerateRequest, SamplingParams, TokenBatch
from serving.token_stream import Pace
from serving.tool_calls import Tool
from serving.vocabulary import TokenPiece
from tests.serving.engine.harness import BLOCK_SIZE, make_engine, running
from tests.serving.http_server import CHAT, TEXT, serving_app

LETTERS = "then \n"
MAX_TOKENS = 40
USERS = {"alice": "key-a", "bob": "key-b"}


@dataclass
class EngineBackend:
    """One engine in this process, behind the memory of answers that the gateway has."""

    template: ChatTemplate
    engine: Engine
    cache_enabled: bool = True
    prompts: list[TokenIds] = field(default_factory=list)
    answers: list[dict[int, list[int]]] = field(default_factory=list)
    """By choice, one entry for each prompt."""
    model_name: str = "tiny"
    max_model_len: int = 512
    created: int = 0

    def __post_init__(self) -> None:
        self.memory = AnswerMemory(self.template.vocabulary)

    @property
    def vocab_size(self) -> int:
        return self.template.vocabulary.size

    def is_ready(self) -> bool:
        return True

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> TokenIds:
        return self.template.render(messages, tools)

    def tokenize(self, text: str) -> TokenIds:
        return self.template.vocabulary.tokenize(text)

    def recall(self, token_ids: TokenIds, tenant: str) -> TokenIds:
        return self.memory.recall(token_ids, tenant)

    def decode_tokens(self, token_ids: Sequence[int]) -> str:
        return self.template.vocabulary.decode(token_ids)

    def token_piece(self, token_id: int) -> TokenPiece:
        return self.template.vocabulary.piece(token_id)

    def generate(
        self,
        token_ids: TokenIds,
        sampling: SamplingParams,
        session_id: str | None,
        use_cache: bool,
        request_id: str,
        num_choices: int,
        tenant: str,
    ) -> AsyncGenerator[TokenBatch, None]:
        use_cache = use_cache and self.cache_enabled
        salt = "" if use_cache else request_id
        root = Fingerprint("weights", "config", "float32", "float32", BLOCK_SIZE, tenant_salt=salt)
        hashes = tuple(chain_hashes(root.root_hash(), token_ids, BLOCK_SIZE))
        choices = tuple(Choice(i) for i in range(num_choices))
        request = GenerateRequest(request_id, token_ids, root, hashes, sampling, Decision.any(), use_cache, choices)
        self.prompts.append(token_ids)
        return self.memory.hear(self._noted(request), token_ids, tenant)

    async def _noted(self, request: GenerateRequest) -> AsyncGenerator[TokenBatch, None]:
        answer: dict[int, list[int]] = {}
        self.answers.append(answer)
        async for batch in Generation(self.engine, None, Pace(), request).batches():
            answer.setdefault(batch.choice, []).extend(batch.token_ids)
            yield batch

    async def purge(self, tenant: str, session_id: str | None, root_hash: BlockHash | None) -> Mapping[str, Any]:
        return {"num_answers": self.memory.forget(tenant)}

    async def warehouse_stats(self) -> Mapping[str, Any]:
        return self.engine.stats()


@dataclass
class Server:
    """A client of it, and what it has seen."""

    client: httpx.Client
    backend: EngineBackend

    def ask(self, path: str, body: Mapping[str, Any], user: str = "alice", seed: int = 1, **extra: Any) -> Any:
        """The answer to `body`, drawn from `LETTERS` alone."""
        answer = self.client.post(path, json={**self.options(seed), **body, **extra}, headers=key_of(user))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stream(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a streamed answer of `alice`."""
        body = {**self.options(seed=1), "messages": messages, "stream": True}
        with self.client.stream("POST", CHAT, json=body, headers=key_of("alice")) as answer:
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)

    def options(self, seed: int) -> dict[str, Any]:
        letters = {int(token_id): 100 for letter in LETTERS for token_id in self.backend.tokenize(letter)}
        return {"model": "tiny", "max_tokens": MAX_TOKENS, "seed": seed, "temperature": 2.0, "logit_bias": letters}

    def text_of(self, token_ids: TokenIds) -> str:
        return self.backend.decode_tokens(token_ids.tolist())

    def plain(self, messages: Sequence[Mapping[str, str]]) -> TokenIds:
        return self.backend.render([ChatMessage(one["role"], one["content"]) for one in messages])

    def last_said(self, choice: int = 0) -> TokenIds:
        """Prompt and answer of the last request."""
        return as_token_ids([*self.backend.prompts[-1], *self.backend.answers[-1][choice]])


@contextmanager
def server_of(model_dir: Path, *, cache_enabled: bool = True) -> Iterator[Server]:
    with running(make_engine(model_dir, num_blocks=256)) as under_test:
        backend = EngineBackend(ChatTemplate.load(model_dir), under_test.engine, cache_enabled)
        keys = frozenset(hash_api_key(key) for key in USERS.values())
        app = build_app(backend, HttpSettings(api_key_hashes=keys))
        with serving_app(app) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield Server(client, backend)


@pytest.fixture
def server(tiny_model_dir: Path) -> Iterator[Server]:
    with server_of(tiny_model_dir) as server:
        yield server


def chat(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def key_of(user: str) -> dict[str, str]:
    return {"authorization": f"Bearer {USERS[user]}"}


def content_of(answer: Any, choice: int = 0) -> str:
    return str(answer["choices"][choice]["message"]["content"])


def cached_tokens(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def starts_with(token_ids: TokenIds, start: TokenIds) -> bool:
    return np.array_equal(token_ids[: len(start)], start)


def test_reuse_reaches_the_end_of_the_last_answer_turn_by_turn(server: Server) -> None:
    messages, said = chat("hello then"), as_token_ids([])
    for turn in range(4):
        plainly = server.plain(messages)
        computed = server.backend.engine.counters["computed_prompt_tokens"]
        answer = server.ask(CHAT, {"messages": messages}, seed=turn)
        computed = server.backend.engine.counters["computed_prompt_tokens"] - computed
        prompt = server.backend.prompts[-1]
        assert starts_with(prompt, said)
        assert server.text_of(prompt) == server.text_of(plainly)
        if turn:
            assert not starts_with(plainly, said), "the answer was to be one that comes back as other ids"
            # The last token sampled has no KV yet.
            assert cached_tokens(answer) == len(said) - 1
            assert computed == len(prompt) - (len(said) - 1)
        said = server.last_said()
        messages += [{"role": "assistant", "content": content_of(answer)}, *chat("and then the next")]


def test_a_streamed_answer_is_remembered_like_a_whole_one(server: Server) -> None:
    text = server.stream(chat("hello then"))
    said = server.last_said()
    server.ask(CHAT, {"messages": chat("hello then", text, "go on")})
    assert starts_with(server.backend.prompts[-1], said)


def test_every_choice_can_be_gone_on_with(server: Server) -> None:
    answer = server.ask(CHAT, {"messages": chat("hello then")}, n=3)
    said = [server.last_said(choice) for choice in range(3)]
    texts = [content_of(answer, choice) for choice in range(3)]
    assert len(set(texts)) == 3
    for text, before in zip(texts, said, strict=True):
        following = server.ask(CHAT, {"messages": chat("hello then", text, "go on")})
        assert starts_with(server.backend.prompts[-1], before)
        assert cached_tokens(following) == len(before) - 1


def test_an_answer_cut_at_a_stop_string(server: Server) -> None:
    answer = server.ask(CHAT, {"messages": chat("hello then")}, seed=3, stop=["\n"])
    said = server.last_said()
    text = content_of(answer)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert text
    messages = chat("hello then", text, "go on")
    assert not starts_with(server.plain(messages), said[:-1])
    following = server.ask(CHAT, {"messages": messages})
    assert starts_with(server.backend.prompts[-1], said[:-1])
    assert cached_tokens(following) == len(said) - 1


def test_an_edited_answer_is_encoded_plainly(server: Server) -> None:
    text = content_of(server.ask(CHAT, {"messages": chat("hello then")}))
    messages = chat("hello then", f"No. {text}", "go on")
    server.ask(CHAT, {"messages": messages})
    assert np.array_equal(server.backend.prompts[-1], server.plain(messages))


def test_another_key_is_another_tenant(server: Server) -> None:
    text = content_of(server.ask(CHAT, {"messages": chat("hello then")}))
    messages = chat("hello then", text, "go on")
    server.ask(CHAT, {"messages": messages}, user="bob")
    assert np.array_equal(server.backend.prompts[-1], server.plain(messages))
    server.ask(CHAT, {"messages": messages})
    assert not np.array_equal(server.backend.prompts[-1], server.plain(messages))


def test_a_prompt_that_goes_on_behind_its_completion(server: Server) -> None:
    first = server.ask(TEXT, {"prompt": "Once upon\nthe then"})
    said = server.last_said()
    text = "Once upon\nthe then" + first["choices"][0]["text"]
    assert not starts_with(server.backend.tokenize(text + "\nObservation:"), said)
    following = server.ask(TEXT, {"prompt": text + "\nObservation:"})
    assert server.text_of(server.backend.prompts[-1]) == text + "\nObservation:"
    # A line break of the answer's end is one with the one that was added.
    num_open = len(text) - len(text.rstrip("\n "))
    assert starts_with(server.backend.prompts[-1], said[: len(said) - num_open])
    assert cached_tokens(following) >= len(said) - 1 - num_open


def test_prompts_are_the_same_with_and_without_the_cache(tiny_model_dir: Path) -> None:
    prompts = []
    for is_enabled in (True, False):
        with server_of(tiny_model_dir, cache_enabled=is_enabled) as server:
            text = content_of(server.ask(CHAT, {"messages": chat("hello then")}))
            messages = chat("hello then", text, "go on")
            server.ask(CHAT, {"messages": messages})
            server.ask(CHAT, {"messages": messages}, tokenloft={"cache": False})
            prompts.append([prompt.tolist() for prompt in server.backend.prompts])
            assert not np.array_equal(server.backend.prompts[1], server.plain(messages))
            assert prompts[-1][1] == prompts[-1][2]
    assert prompts[0] == prompts[1]


def test_a_prompt_that_would_be_too_long_stays_plain(server: Server) -> None:
    text = content_of(server.ask(CHAT, {"messages": chat("hello then")}))
    messages = chat("hello then", text, "go on")
    plainly = server.plain(messages)
    server.ask(CHAT, {"messages": messages}, max_tokens=server.backend.max_model_len - len(plainly))
    assert np.array_equal(server.backend.prompts[-1], plainly)
