"""Purges over a real socket: what is understood, what is refused, and whose KV is meant."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serving.http_errors import purge_incomplete
from serving.http_settings import HttpSettings, hash_api_key
from tests.serving.http_server import ScriptedBackend, client_of

PURGE = "/warehouse/purge"
KEYS = HttpSettings(api_key_hashes=frozenset({hash_api_key("one"), hash_api_key("two")}))


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def client(backend: ScriptedBackend) -> Iterator[httpx.Client]:
    with client_of(backend) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "session_id", "root_hash"),
    [
        ({"session": "my-agent"}, "my-agent", None),
        ({"tenant": True}, None, None),
        ({"fingerprint": "00ff" * 8}, None, b"\x00\xff" * 8),
    ],
)
def test_what_is_meant(
    backend: ScriptedBackend, client: httpx.Client, body: Any, session_id: str | None, root_hash: bytes | None
) -> None:
    answer = client.post(PURGE, json=body)
    assert (answer.status_code, answer.json()) == (200, {"num_blocks": 3, "num_left": 0})
    assert backend.calls == [{"tenant": "", "session_id": session_id, "root_hash": root_hash}]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, None, "name one of"),
        ({"session": "a", "tenant": True}, None, "name one of"),
        ({"sesion": "a"}, "sesion", ""),
        ({"session": None}, None, "null names nothing"),
        ({"session": ""}, "session", ""),
        ({"session": "a b"}, "session", ""),
        ({"session": "a\n"}, "session", ""),
        ({"session": 7}, "session", ""),
        ({"tenant": False}, "tenant", ""),
        ({"tenant": "acme"}, "tenant", ""),
        ({"tenant": 1}, "tenant", ""),
        ({"fingerprint": "00ff"}, "fingerprint", ""),
        ({"fingerprint": "zz" * 16}, "fingerprint", ""),
        ([], None, ""),
        (True, None, ""),
    ],
)
def test_what_is_not_understood_purges_nothing(
    backend: ScriptedBackend, client: httpx.Client, body: Any, param: str | None, said: str
) -> None:
    answer = client.post(PURGE, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert said in error["message"]
    assert backend.calls == []


def test_a_page_of_another_site_can_not_have_it_done(backend: ScriptedBackend, client: httpx.Client) -> None:
    assert client.post(PURGE, content='{"tenant": true}', headers={"content-type": "text/plain"}).status_code == 415
    assert client.get(PURGE).status_code == 405
    assert backend.calls == []


def test_each_key_reaches_its_own_alone(backend: ScriptedBackend) -> None:
    with client_of(backend, KEYS) as client:
        for headers in ({}, {"authorization": "Bearer three"}):
            assert client.post(PURGE, json={"tenant": True}, headers=headers).status_code == 401
        assert backend.calls == []
        for key in ("one", "two"):
            client.post(PURGE, json={"session": "same"}, headers={"authorization": f"Bearer {key}"})
    assert [call["tenant"] for call in backend.calls] == [KEYS.tenant("Bearer one"), KEYS.tenant("Bearer two")]


def test_it_is_no_success_if_somebody_was_not_reached() -> None:
    with client_of(ScriptedBackend(failure=purge_incomplete("an engine"))) as client:
        answer = client.post(PURGE, json={"tenant": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "purge_incomplete")
    assert answer.headers["retry-after"] == "1"


def test_a_model_that_is_not_ready_is_said_to_be() -> None:
    with client_of(ScriptedBackend(ready=False)) as client:
        assert client.post(PURGE, json={"tenant": True}).json()["error"]["code"] == "model_not_ready"
