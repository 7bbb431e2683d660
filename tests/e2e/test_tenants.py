"""Two API keys on one real server: neither finds the other's KV, and each has its own deleted, everywhere."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Server, ServerHome

pytestmark = pytest.mark.slow

SETTINGS = {"http.api_keys": "[anna-key, bert-key]", "prefill.remote_threshold_tokens": 64}
FIRST, SECOND = ([{"role": "user", "content": word * 60}] for word in ("first ", "other "))
FEW = 64
"""Tokens that two prompts may begin with alike."""


@pytest.fixture(scope="module")
def server(plain_model_dir: Path) -> Iterator[Server]:
    with ServerHome() as home, Server(home, str(plain_model_dir), SETTINGS) as server:
        yield server


def cached_tokens(server: Server, key: str, messages: list[dict[str, str]], session_id: str) -> int:
    """Tokens of the prompt that somebody had computed before; all turns are on disk afterwards."""
    server.client.headers["authorization"] = f"Bearer {key}"
    answer = server.chat(messages, 4, session_id=session_id)
    assert answer.num_prompt_tokens > 4 * FEW
    server.settle()
    return answer.cached_tokens


def command(server: Server, *arguments: str, status: int = 0) -> Any:
    """What a command of the warehouse says in JSON."""
    options = ["--warehouse", str(server.home.warehouse), "--set", f"http.port={server.port}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "serving", "warehouse", *arguments, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def test_each_key_has_its_own_and_has_it_deleted(server: Server) -> None:
    for key in ("anna-key", "bert-key"):
        assert cached_tokens(server, key, FIRST, "one") == 0
        assert cached_tokens(server, key, SECOND, "two") < FEW
        assert cached_tokens(server, key, FIRST, "one") > 4 * FEW
    assert server.counters()["prefill"]["computed_tokens"] > 0, "prefill has had a part in it"

    server.client.headers["authorization"] = "Bearer anna-key"
    receipt = server.client.post("/warehouse/purge", json={"session": "one"}).json()
    assert receipt["num_left"] == 0
    for figure in ("num_tokens", "num_files", "num_device_blocks", "num_answers", "dram_bytes", "disk_bytes"):
        assert receipt[figure] > 0, receipt
    again = server.client.post("/warehouse/purge", json={"session": "one"}).json()
    assert {again[figure] for figure in ("num_tokens", "num_device_blocks", "num_answers")} == {0}
    assert cached_tokens(server, "anna-key", FIRST, "one") < FEW
    assert cached_tokens(server, "anna-key", SECOND, "two") > 4 * FEW
    assert cached_tokens(server, "bert-key", FIRST, "one") > 4 * FEW

    receipt = command(server, "purge", "--tenant", "--api-key", "bert-key")
    assert (receipt["num_left"], receipt["num_device_blocks"] > 0) == (0, True)
    assert cached_tokens(server, "bert-key", SECOND, "two") == 0
    assert cached_tokens(server, "anna-key", FIRST, "one") > 4 * FEW

    assert len(command(server, "stats")["folder"]["fingerprints"]) == 2
    assert command(server, "verify")["num_bad"] == 0
    server.stop()
    assert command(server, "verify")["is_quarantined"] is True
    assert command(server, "purge", "--all")["num_left"] == 0
    assert server.home.extent_files() == []
