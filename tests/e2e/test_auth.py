"""Ray's own ports listen on all interfaces, and whoever gets in can run code: without the token nobody does."""

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server, ServerHome

pytestmark = pytest.mark.slow

# In a process of its own: Ray reads its token once, when it is imported.
CONNECT = """
import json, logging, sys
import ray
try:
    ray.init(address=sys.argv[1], namespace="tokenloft", logging_level=logging.ERROR, log_to_driver=False)
    stores = [each for each in ray.util.list_named_actors() if each.startswith("node-store-")]
    print(json.dumps({"connected": True, "stores": len(stores)}))
except Exception as error:
    print(json.dumps({"connected": False, "error": f"{type(error).__name__}: {error}"}))
"""


@pytest.fixture(scope="module")
def server(plain_model_dir: Path) -> Iterator[Server]:
    with ServerHome() as home, Server(home, str(plain_model_dir), {"prefill.replicas": 0}) as server:
        yield server


def gcs_address(server: Server) -> str:
    """Where the server's private Ray can be joined, which every one of its daemons is told on its command line."""
    matches = [re.search(r"--gcs-address=(\S+)", command) for command in server.processes().values()]
    addresses = {match[1] for match in matches if match is not None}
    assert len(addresses) == 1, addresses
    return addresses.pop()


def connect(server: Server, **environment: str) -> dict[str, object]:
    """Try to join the server's private Ray with these settings; what came of it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Away from the user's own token, which Ray would take up; and without 20 tries of a second each.
    clean |= {"HOME": str(server.home.path), "RAY_NUM_REDIS_GET_RETRIES": "3"}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, gcs_address(server)],
        env=clean | environment,
        cwd=server.home.path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # A driver that is refused late may be ended by Ray itself, without a word on standard output.
    lines = done.stdout.strip().splitlines()
    if not lines:
        return {"connected": False, "error": done.stderr}
    result: dict[str, object] = json.loads(lines[-1])
    return result


def test_the_right_token_connects(server: Server) -> None:
    result = connect(server, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(server.home.token_path))
    assert result == {"connected": True, "stores": 1}


def test_a_wrong_token_does_not(server: Server) -> None:
    result = connect(server, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert result["connected"] is False, result
    assert server.is_healthy()


def test_no_token_does_not(server: Server) -> None:
    result = connect(server)
    assert result["connected"] is False, result
    assert server.is_healthy()


def test_the_token_and_the_warehouse_are_the_users_alone(server: Server) -> None:
    assert server.home.token_path.stat().st_mode & 0o777 == 0o600
    assert server.home.warehouse.stat().st_mode & 0o777 == 0o700
