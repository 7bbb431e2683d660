"""The Python SDK: conversations over HTTP, with what each answer reused.

    from serving.sdk import Tokenloft

    with Tokenloft("http://127.0.0.1:8000") as client:
        session = client.session("my-agent")
        print(session.ask("What is a KV cache?").text)
        for piece in session.stream("And why keep it?"):
            print(piece, end="", flush=True)
        print(session.last.reuse)

A session is its messages and an id; the server keeps no state of it but KV blocks, which anybody may lose. It talks
plain HTTP and needs neither Ray nor torch.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx2

Message = dict[str, str]


class TokenloftError(Exception):
    """The server refused or failed; `status` is its HTTP status, 0 if it could not be reached."""

    def __init__(self, message: str, status: int = 0, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass(frozen=True, slots=True)
class Reuse:
    """Where the KV of a prompt came from, in tokens, and what it cost, in seconds."""

    prompt_tokens: int
    device: int
    dram: int
    disk: int
    remote: int
    computed: int
    load_s: float
    ttft_s: float
    saved_s: float
    """Estimate: computing what was reused, less loading it."""
    route: str

    @property
    def cached(self) -> int:
        return self.device + self.dram + self.disk + self.remote

    def __str__(self) -> str:
        tiers = {"pool": self.device, "dram": self.dram, "disk": self.disk, "other nodes": self.remote}
        parts = [f"{num_tokens:,} from {tier}" for tier, num_tokens in tiers.items() if num_tokens]
        reused = f"{self.cached:,} of {self.prompt_tokens:,} prompt tokens reused"
        detail = f" ({', '.join(parts)})" if parts else ""
        return f"{reused}{detail}, {self.saved_s:.1f} s saved, first token after {self.ttft_s:.2f} s"

    @classmethod
    def from_usage(cls, usage: Mapping[str, Any]) -> "Reuse":
        ours = usage["tokenloft"]
        return cls(
            prompt_tokens=usage["prompt_tokens"],
            **ours["cached"],
            computed=sum(ours["computed"].values()),
            load_s=ours["load_s"],
            ttft_s=ours["ttft_s"],
            saved_s=ours["saved_s"],
            route=ours["route"],
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    text: str
    finish_reason: str
    completion_tokens: int
    reuse: Reuse


class Tokenloft:
    """A client of one server. `model` defaults to the one that the server has."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout_s)
        self._model = model

    def __enter__(self) -> "Tokenloft":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def model(self) -> str:
        """The model's id, asked for once."""
        if self._model is None:
            with _translated():
                answer = self._http.get("/v1/models")
                _check(answer)
                self._model = str(answer.json()["data"][0]["id"])
        return self._model

    def session(self, session_id: str | None = None, messages: list[Message] | None = None) -> "Session":
        """A conversation; without an id it gets one of its own."""
        return Session(self, session_id or uuid.uuid4().hex, list(messages or []))

    def purge(self, session_id: str) -> dict[str, int]:
        """Have the server delete what it has stored of a session of this client's API key.

        The receipt counts extents, blocks, tokens, bytes and files, and what is left: see `PurgeReceipt`.
        """
        with _translated():
            answer = self._http.post("/warehouse/purge", json={"session": session_id})
            _check(answer)
            receipt: dict[str, int] = answer.json()
            return receipt

    def stream_chat(
        self, messages: list[Message], session_id: str | None = None, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Chunks of a chat completion as the server sends them; `options` go into the request's body."""
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        headers = {"x-session-id": session_id} if session_id else {}
        with _translated(), self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            if answer.is_error:
                answer.read()
                _check(answer)
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise TokenloftError(chunk["error"]["message"])
                    yield chunk


@dataclass
class Session:
    """One conversation: every turn sends the whole history, and the server computes only what is new."""

    client: Tokenloft
    session_id: str
    messages: list[Message] = field(default_factory=list)
    last: Answer | None = None

    def ask(self, text: str, **options: Any) -> Answer:
        """Send a message and wait for the whole answer."""
        for _ in self.stream(text, **options):
            pass
        assert self.last is not None
        return self.last

    def stream(self, text: str, **options: Any) -> Iterator[str]:
        """Send a message and yield the answer's text as it comes; `last` holds the answer afterwards.

        A turn that fails or is abandoned leaves the session as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        finish_reason, usage = "", None
        for chunk in self.client.stream_chat(messages, self.session_id, **options):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                piece = choice["delta"].get("content")
                if piece:
                    pieces.append(piece)
                    yield piece
        if usage is None:
            raise TokenloftError("the answer broke off before its end")
        answer = "".join(pieces)
        self.last = Answer(answer, finish_reason, usage["completion_tokens"], Reuse.from_usage(usage))
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def forget(self) -> dict[str, int]:
        """Have the server delete what it has stored of this conversation; the receipt says how much.

        History that a fork shares stays for it. The messages stay here: another turn computes them again.
        """
        return self.client.purge(self.session_id)

    def fork(self, session_id: str | None = None) -> "Session":
        """A second conversation with the same history; both go on from the same blocks."""
        return self.client.session(session_id, self.messages)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except httpx2.HTTPError as error:
        raise TokenloftError(f"the server can't be reached: {error}") from error


def _check(answer: httpx2.Response) -> None:
    if not answer.is_error:
        return
    try:
        error = answer.json()["error"]
        message, param = error["message"], error["param"]
    except (ValueError, KeyError, TypeError):
        message, param = answer.text[:200], None
    raise TokenloftError(message, answer.status_code, param)
