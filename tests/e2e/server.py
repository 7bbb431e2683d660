"""The real command in a process session of its own, and a client of it.

    with ServerHome() as home, Server(home, model, {"decode.replicas": 2}) as server:
        answer = server.chat(messages, max_tokens=24)
        server.stop()

Every process that the command starts belongs to its session, so that the session says what is left of it. A second
`Server` on the same home is a restart: same warehouse, same Ray token.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

SILENCE_S = 120.0
"""A start that writes nothing to its log for so long has hung. There is no limit on the whole."""
READY = "ready after"
STOP_S = 90.0
POLL_S = 0.1
LOG_TAIL_CHARS = 6000

Message = Mapping[str, str]

SMALL: Mapping[str, object] = {
    "prefill.threads": 1,
    "decode.threads": 1,
    "prefill.pool_bytes": "16MB",
    "decode.pool_bytes": "64MB",
    "cache.dram_bytes": "96MB",
    "cache.handoff_bytes": "16MB",
    "cache.disk_bytes": "1GB",
    "cache.min_free_bytes": 0,
    "prefill.accept_timeout_s": 30.0,
}
"""Sizes that fit a small machine. Decode waits longer for prefill, so that a busy machine changes no counter."""


class ServerHome:
    """What outlives a server: a short temporary folder for warehouse, Ray's files, token and log."""

    def __init__(self) -> None:
        # Ray's sockets lie in here, and their paths must stay short.
        self.path = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))

    @property
    def warehouse(self) -> Path:
        return self.path / "warehouse"

    @property
    def ray_directory(self) -> Path:
        return self.path / "ray"

    @property
    def token_path(self) -> Path:
        return self.path / "state" / "tokenloft" / "ray_auth_token"

    @property
    def log_path(self) -> Path:
        return self.path / "serve.log"

    def extent_files(self) -> list[Path]:
        return sorted(self.warehouse.glob("extents/*/*/*.kv"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One answer, with the client's own clock."""

    text: str
    finish_reason: str
    usage: Mapping[str, Any]
    ttft_s: float
    """From sending to the first piece of text; to the whole answer where it was not streamed."""

    @property
    def num_tokens(self) -> int:
        return int(self.usage["completion_tokens"])

    @property
    def num_prompt_tokens(self) -> int:
        return int(self.usage["prompt_tokens"])

    @property
    def cached_tokens(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])

    @property
    def by_tier(self) -> Mapping[str, int]:
        cached: Mapping[str, int] = self.usage["tokenloft"]["cached"]
        return cached


class Server:
    """`python -m serving serve`, from start to end. Killed at the end of the block, whatever happened."""

    def __init__(self, home: ServerHome, model: str, settings: Mapping[str, object] | None = None) -> None:
        self.home = home
        self.port = free_port()
        self.model = model
        self._settings = {**SMALL, **(settings or {}), "ray.temp_dir": home.ray_directory}
        self._process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=300.0, trust_env=False)

    def __repr__(self) -> str:
        return f"<Server {self.model} on port {self.port} in {self.home.path}>"

    # -- start and end ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._process = spawn(self.home, self.command())
            self._wait_until_ready()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"--- log of {self!r}\n{self.log_tail()}")
        self.client.close()
        if self._process is not None:
            self.kill_all()

    def command(self) -> list[str]:
        """The command line, beginning with the interpreter."""
        options = [f"--set={key}={value}" for key, value in self._settings.items()]
        named = ["--model", self.model, "--port", str(self.port), "--warehouse", str(self.home.warehouse)]
        return [sys.executable, "-m", "serving", "serve", *named, *options]

    @property
    def session(self) -> int:
        """The id of the process session, which is the process id of the command."""
        assert self._process is not None, "the server was never started"
        return self._process.pid

    def _wait_until_ready(self) -> None:
        # Health is of the model, which answers as soon as one decode replica does; the log's word is for everything.
        assert self._process is not None
        size, quiet_since = -1, time.monotonic()
        while READY not in self.log_tail() or not self.is_healthy():
            assert self._process.poll() is None, f"the server ended with status {self._process.returncode}"
            grown = self.home.log_path.stat().st_size
            if grown != size:
                size, quiet_since = grown, time.monotonic()
            assert time.monotonic() - quiet_since < SILENCE_S, "the server hangs while it starts"
            time.sleep(POLL_S)

    def is_healthy(self) -> bool:
        """Whether `/health` answers 200."""
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """SIGTERM to the command; it ends with status 0, and all that it started has ended with it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(STOP_S)
        assert status == 0, f"the server ended with status {status}\n{self.log_tail()}"
        # Orphans that have been told to end take a moment; one that has not been told stays.
        wait_until(lambda: not self.processes(), "every process of the session has ended", STOP_S)

    def kill_all(self) -> None:
        """SIGKILL to every process of the session, until none is left."""
        assert self._process is not None
        deadline = time.monotonic() + STOP_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"these survive SIGKILL: {left}"
            for pid in left:
                kill_if_there(pid)
            # Reaps the command itself; the others are init's to reap.
            self._process.poll()
            time.sleep(POLL_S)
        self._process.wait(STOP_S)

    def processes(self) -> dict[int, str]:
        """Process ids and titles of all that lives in the session; zombies don't."""
        return session_processes(self.session)

    def replica_pids(self, deployment: str) -> list[int]:
        """Process ids of the replicas of one deployment, by the titles that Ray gives them."""
        title = f"ray::ServeReplica:tokenloft:{deployment}"
        return [pid for pid, command in self.processes().items() if command.startswith(title)]

    def log_tail(self) -> str:
        """The end of what the command has written."""
        return self.home.log_path.read_text(errors="replace")[-LOG_TAIL_CHARS:]

    # -- client -------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        return Path(self.model).name

    def body(self, messages: Sequence[Message], max_tokens: int, *, use_cache: bool = True) -> dict[str, Any]:
        """A greedy request."""
        return {
            "model": self.model_name,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "tokenloft": {"cache": use_cache},
        }

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        *,
        use_cache: bool = True,
        stream: bool = True,
        session_id: str | None = None,
    ) -> ChatAnswer:
        """Ask greedily. Raises AssertionError for anything but a whole answer."""
        body = self.body(messages, max_tokens, use_cache=use_cache)
        headers = {} if session_id is None else {"x-session-id": session_id}
        return self._stream(body, headers) if stream else self._whole(body, headers)

    def _whole(self, body: dict[str, Any], headers: dict[str, str]) -> ChatAnswer:
        started = time.monotonic()
        response = self.client.post("/v1/chat/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        answer = response.json()
        choice = answer["choices"][0]
        seconds = time.monotonic() - started
        return ChatAnswer(choice["message"]["content"], choice["finish_reason"], answer["usage"], seconds)

    def _stream(self, body: dict[str, Any], headers: dict[str, str]) -> ChatAnswer:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        texts, finish_reason, usage, ttft_s = [], "", None, None
        started = time.monotonic()
        with self.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            for event in events(response):
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    finish_reason = choice["finish_reason"] or finish_reason
                    if text := choice["delta"].get("content"):
                        ttft_s = ttft_s or time.monotonic() - started
                        texts.append(text)
        assert usage is not None, f"the stream ended without usage after {''.join(texts)!r}"
        return ChatAnswer("".join(texts), finish_reason, usage, ttft_s or time.monotonic() - started)

    def stats(self) -> dict[str, Any]:
        """State of the node stores and counters of the engines."""
        response = self.client.get("/warehouse/stats")
        assert response.status_code == 200, response.text
        stats: dict[str, Any] = response.json()
        return stats

    def counters(self) -> dict[str, Counter[str]]:
        """Counters by role, those of all engines of a role added up; waits while a role does not answer."""
        deadline = time.monotonic() + STOP_S
        while True:
            engines = self.stats()["engines"]
            # Instead of its engines' counters a role may have a text that says why there are none.
            if not any(isinstance(each, str) for each in engines.values()):
                return {role: add_up(engines.get(role, [])) for role in ("decode", "prefill")}
            assert time.monotonic() < deadline, f"no counters: {engines}"
            time.sleep(POLL_S)

    def store(self) -> dict[str, Any]:
        """State of the one node store."""
        (store,) = self.stats()["stores"]
        return dict(store)

    def settle(self) -> None:
        """Wait until every turn that was answered is committed and on disk."""
        # An engine keeps a turn's blocks until it is committed; only then does the store know what it has to write.
        wait_until(lambda: not self.counters()["decode"]["num_used_blocks"], "all turns are committed")
        wait_until(lambda: not self.store()["dirty_bytes"], "all turns are on disk")


def add_up(engines: Sequence[Mapping[str, float]]) -> Counter[str]:
    """The counters of all `engines`; what is no whole number is no counter."""
    total: Counter[str] = Counter()
    for engine in engines:
        total.update({name: int(value) for name, value in engine.items() if float(value).is_integer()})
    return total


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream of chat chunks, up to `[DONE]`."""
    if response.status_code != 200:
        raise AssertionError(response.read().decode())
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line:
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            yield event
    raise AssertionError("the stream ended without [DONE]")


def spawn(home: ServerHome, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Run `command` in a session of its own, its output in the home's log."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["XDG_STATE_HOME"] = str(home.path / "state")
    with home.log_path.open("wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def session_processes(session: int) -> dict[int, str]:
    """Process ids and command lines of all processes of `session` that are no zombies."""
    found: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field is a name in parentheses and may hold anything: count from behind it.
            state, _, _, session_field = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session_field) == session and state != "Z":
                command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(stat.parent.name)] = command.decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def kill_if_there(pid: int) -> None:
    """SIGKILL to a process that may have just ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Poll until `condition` holds. Raises AssertionError that says `what` did not come to be."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(POLL_S)
