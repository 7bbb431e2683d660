"""The ways in beside plain HTTP: the SDK, `tokenloft chat`, and a Ray job, against a server as a user starts it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.sdk import Tokenloft, TokenloftError
from tests.e2e.server import Server, ServerHome, free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(plain_model_dir: Path) -> Iterator[Server]:
    with ServerHome() as home, Server(home, str(plain_model_dir)) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Tokenloft]:
    with Tokenloft(f"http://127.0.0.1:{server.port}") as client:
        yield client


def test_a_session_reuses_its_history(client: Tokenloft) -> None:
    session = client.session("mine")
    first = session.ask("Tell me about warehouses, at some length.", max_tokens=20, temperature=0)
    pieces = list(session.stream("And about trains?", max_tokens=20, temperature=0))
    assert session.last is not None
    assert session.last.text == "".join(pieces)
    assert session.last.reuse.cached >= first.reuse.prompt_tokens + first.completion_tokens - 1
    assert session.last.reuse.cached + session.last.reuse.computed == session.last.reuse.prompt_tokens
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_a_fork_shares_the_history_and_nothing_else(client: Tokenloft) -> None:
    session = client.session()
    session.ask("Begin.", max_tokens=10, temperature=0)
    fork = session.fork()
    assert fork.session_id != session.session_id
    answer = fork.ask("Another way.", max_tokens=10, temperature=0)
    assert answer.reuse.cached > 0
    assert len(session.messages) == 2
    assert len(fork.messages) == 4


def test_a_refused_turn_leaves_the_session_as_it_was(client: Tokenloft) -> None:
    session = client.session()
    with pytest.raises(TokenloftError, match="max_tokens") as caught:
        session.ask("Too much.", max_tokens=10**6)
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")
    assert session.messages == []


def test_a_session_is_forgotten_on_request(client: Tokenloft) -> None:
    session = client.session()
    first = session.ask("Nobody may keep this sentence, nor any other one of this conversation.", max_tokens=10)
    receipt = session.forget()
    assert (receipt["num_tokens"] > first.completion_tokens, receipt["num_left"]) == (True, 0)
    assert session.forget()["num_tokens"] == 0
    assert session.ask("Again?", max_tokens=5).reuse.cached < first.reuse.prompt_tokens
    with pytest.raises(TokenloftError) as caught:
        client.purge("not an id")
    assert (caught.value.status, caught.value.param) == (400, "session")


def test_an_unreachable_server_is_one_clear_error() -> None:
    with Tokenloft(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(TokenloftError, match="reached"):
        client.session().ask("Anybody?")


def run_chat(server: Server, lines: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-m", "serving", "chat", "--url", url, "--max-tokens", "12", *options]
    return subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=120, check=False)


def test_chat_in_a_pipe_answers_on_standard_output(server: Server, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    done = run_chat(server, ["Hello there.", "/fork", "Go on.", f"/save {saved}", "/new", "/nonsense", "Again."])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 3
    assert done.stderr.count("prompt tokens reused") == 3
    assert "there is no /nonsense" in done.stderr
    # The random model says any byte now and then, an escape too, but hardly the beginning of a colour.
    assert "\x1b" not in done.stderr
    assert "\x1b[" not in done.stdout, "colours outside a terminal"
    messages = json.loads(saved.read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    resumed = run_chat(server, ["And then?"], "--load", str(saved))
    assert resumed.returncode == 0
    assert re.search(r"\b0 of", resumed.stderr) is None


def test_chat_with_a_bad_file_is_one_clear_line(server: Server, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("[1, 2]")
    done = run_chat(server, [], "--load", str(bad))
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error:")
    assert str(bad) in done.stderr
