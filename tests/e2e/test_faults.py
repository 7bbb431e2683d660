"""What goes wrong on a running system: clients that leave, processes that die, damaged files, bad requests.

A lost cache is a slow answer, never a wrong or failed one, and nothing that a client sends ends a process.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conversations import SHORT, log_lines
from tests.e2e.dialogue import Checker, Dialogue, Memory, in_rounds, play
from tests.e2e.server import Server, ServerHome, session_processes, spawn, wait_until

pytestmark = pytest.mark.slow

LONG_TEXT = log_lines(70, "ledger")
"""About 3,000 tokens of the tiny model."""


@pytest.fixture(scope="module")
def checker(plain_model_dir: Path) -> Checker:
    return Checker(plain_model_dir, max_tokens=16)


@pytest.fixture(scope="module")
def server(plain_model_dir: Path) -> Iterator[Server]:
    """Prefill takes small steps, so that it can be interrupted."""
    settings = {"prefill.chunk_tokens": 32, "cache.min_free_bytes": 0}
    with ServerHome() as home, Server(home, str(plain_model_dir), settings) as server:
        yield server


@pytest.fixture(scope="module")
def forgetful_server(plain_model_dir: Path) -> Iterator[Server]:
    """So little memory that what was said a few turns ago is only on disk."""
    settings = {
        "prefill.replicas": 0,
        "decode.pool_bytes": "1700KB",
        "cache.dram_bytes": "1MB",
        "cache.extent_max_bytes": "200KB",
    }
    with ServerHome() as home, Server(home, str(plain_model_dir), settings) as server:
        yield server


def ask(server: Server, checker: Checker, text: str) -> None:
    """One question in a conversation of its own, answered as the oracle does."""
    messages = [{"role": "user", "content": text}]
    checker.check(checker.render(messages), server.chat(messages, checker.max_tokens))


# -- clients ----------------------------------------------------------------------------------------


@contextmanager
def sent(server: Server, body: dict[str, Any]) -> Iterator[None]:
    """A request whose answer nobody reads; the connection is closed with the block."""
    url, content = server.client.base_url, json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {url.host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        yield


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_hangs_up_stops_its_work(server: Server, stream: bool) -> None:
    before = server.counters()["decode"]
    body = server.body([{"role": "user", "content": "Tell me everything."}], 3500) | {"stream": stream}
    if stream:
        with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with sent(server, body | {"n": 8}):
            wait_until(
                lambda: server.counters()["decode"]["generated_tokens"] > before["generated_tokens"], "it is under way"
            )
    wait_until(lambda: server.counters()["decode"]["cancelled"] > before["cancelled"], "the request is cancelled")
    stopped = server.counters()["decode"]
    time.sleep(0.5)
    after = server.counters()["decode"]
    assert after["steps"] == stopped["steps"]
    assert after["generated_tokens"] - before["generated_tokens"] < (3500 if stream else 8 * 3500)
    wait_until(lambda: server.counters()["decode"]["num_used_blocks"] == 0, "its blocks are given back")
    assert server.counters()["decode"]["num_admitted"] == 0


USER = {"role": "user", "content": "Hi."}

BAD_BODIES: dict[str, Any] = {
    "no JSON": b'{"model": ',
    "not even text": b"\xff\xfe\x00\x01",
    "a list": [],
    "no messages": {"messages": None},
    "empty messages": {"messages": []},
    "messages of a wrong type": {"messages": "Hi."},
    "unknown role": {"messages": [{"role": "wizard", "content": "Hi."}]},
    "content of a wrong type": {"messages": [{"role": "user", "content": 7}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "unknown model": {"model": "gpt-5"},
    "model of a wrong type": {"model": 5},
    "max_tokens of 0": {"max_tokens": 0},
    "max_tokens beyond the context": {"max_tokens": 1_000_000},
    "a prompt beyond the context": {"messages": [{"role": "user", "content": "x, " * 5000}]},
    "temperature as text": {"temperature": "hot"},
    "temperature out of range": {"temperature": -1},
    "top_p of 0": {"top_p": 0},
    "seed beyond 64 bits": {"seed": 2**70},
    "an empty stop string": {"stop": ""},
    "five stop strings": {"stop": ["a", "b", "c", "d", "e"]},
    "too many choices": {"n": 17},
    "tools": {"tools": [{"type": "function", "function": {}}]},
    "a lone surrogate": b'{"model": "tiny-plain", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "a misspelt extension": {"tokenloft": {"cash": False}},
    "stream of a wrong type": {"stream": "yes"},
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_request_is_the_clients_fault(server: Server, name: str) -> None:
    bad = BAD_BODIES[name]
    good = {"model": server.model_name, "messages": [USER], "max_tokens": 4}
    headers = {"content-type": "application/json"}
    if isinstance(bad, bytes):
        response = server.client.post("/v1/chat/completions", content=bad, headers=headers)
    else:
        body = good | bad if isinstance(bad, dict) else bad
        response = server.client.post("/v1/chat/completions", json=body)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["message"]
    assert {"type", "param", "code"} <= set(error)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/chat/completions"), ("POST", "/v1/models"), ("GET", "/v1/models/none"), ("GET", "/x")],
)
def test_a_wrong_path_or_method_is_the_clients_fault(server: Server, method: str, path: str) -> None:
    response = server.client.request(method, path)
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


# -- processes --------------------------------------------------------------------------------------


def test_a_killed_prefill_replica_costs_time_only(server: Server, checker: Checker) -> None:
    (pid,) = server.replica_pids("prefill")
    before = server.counters()
    messages = [{"role": "user", "content": LONG_TEXT}]
    prompt = checker.render(messages)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(server.chat, messages, checker.max_tokens)
        wait_until(
            lambda: server.counters()["prefill"]["computed_tokens"] > before["prefill"]["computed_tokens"],
            "prefill is at work",
        )
        os.kill(pid, signal.SIGKILL)
        answer = pending.result()
    checker.check(prompt, answer)
    computed = answer.usage["tokenloft"]["computed"]
    assert computed["decode"] > 64, f"prefill was done before it was killed: {computed}"
    wait_until(lambda: server.replica_pids("prefill") not in ([], [pid]), "Serve starts another prefill replica")
    ask(server, checker, f"Again: {LONG_TEXT}")
    assert server.is_healthy()


def test_a_second_server_on_the_same_warehouse_is_refused(server: Server, checker: Checker) -> None:
    with ServerHome() as home:
        arguments = Server(home, server.model, {"prefill.replicas": 0}).command()
        arguments[arguments.index("--warehouse") + 1] = str(server.home.warehouse)
        status, error_lines = run_to_its_end(home, arguments)
    assert status == 1
    assert len(error_lines) == 1
    assert str(server.home.warehouse) in error_lines[0]
    ask(server, checker, "Are you still there?")


def test_a_port_in_use_is_one_clear_line(plain_model_dir: Path) -> None:
    with ServerHome() as home, socket.socket() as listener:
        server = Server(home, str(plain_model_dir))
        listener.bind(("127.0.0.1", server.port))
        listener.listen()
        status, error_lines = run_to_its_end(home, server.command())
    assert status == 1
    assert len(error_lines) == 1
    assert str(server.port) in error_lines[0]


def run_to_its_end(home: ServerHome, command: list[str]) -> tuple[int, list[str]]:
    """Exit status, and the error lines of its log. It leaves no traceback and no process."""
    process: subprocess.Popen[bytes] = spawn(home, command)
    status = process.wait(120)
    wait_until(lambda: not session_processes(process.pid), "all that it started has ended")
    log = home.log_path.read_text()
    assert "Traceback" not in log, log
    return status, [line for line in log.splitlines() if line.startswith("error:")]


# -- files ------------------------------------------------------------------------------------------


def test_damaged_files_are_computed_again(forgetful_server: Server, checker: Checker) -> None:
    server, memory = forgetful_server, Memory()
    play(server, checker, in_rounds([Dialogue(each) for each in SHORT[:12]]), memory)
    server.settle()
    files = server.home.extent_files()
    assert len(files) > 20
    for path in files:
        data = bytearray(path.read_bytes())
        data[-100] ^= 0x55
        path.write_bytes(data)
    turns = play(server, checker, in_rounds([Dialogue(each) for each in SHORT[:12]]), memory)
    assert server.store()["counters"]["quarantined_extents"] >= 1
    assert sum(turn.decode["computed_prompt_tokens"] for turn in turns) > 1000


def test_a_warehouse_folder_that_vanishes_costs_time_only(forgetful_server: Server, checker: Checker) -> None:
    server = forgetful_server
    play(server, checker, in_rounds([Dialogue(each) for each in SHORT[:8]]), Memory())
    server.settle()
    shutil.rmtree(server.home.warehouse)
    for _ in range(2):
        play(server, checker, in_rounds([Dialogue(each) for each in SHORT[:8]]), Memory())
    assert server.is_healthy()


# -- the end ----------------------------------------------------------------------------------------


def test_a_stop_ends_all_that_was_started_and_nothing_else(
    server: Server, forgetful_server: Server, checker: Checker
) -> None:
    neighbours = server.processes()
    forgetful_server.stop()
    assert set(neighbours) <= set(server.processes())
    ask(server, checker, "Was that you?")
    server.stop()
