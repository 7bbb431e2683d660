"""The app as a whole, over a real socket: routes, keys, ids, streams, clients that hang up, failures."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from serving.http_errors import ApiError
from serving.http_settings import HttpSettings, hash_api_key
from serving.protocol import SamplingParams
from tests.serving.http_server import (
    BODY,
    CHAT,
    ENDLESS,
    MAX_MODEL_LEN,
    SILENT,
    WAIT_S,
    ScriptedBackend,
    but,
    client_of,
    serving,
)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A client of a server that the tests do not change."""
    with client_of(ScriptedBackend(), HttpSettings(max_body_bytes=4096)) as client:
        yield client


def events_of(response: httpx.Response) -> list[Any]:
    """The JSON of every event; `[DONE]` stays a word."""
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_a_large_body_without_a_length_is_stopped_too(client: httpx.Client) -> None:
    response = client.post(CHAT, content=iter([b" " * 3000] * 2), headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_numbers_are_named_when_the_context_is_too_short(client: httpx.Client) -> None:
    message = client.post(CHAT, **but(max_completion_tokens=62)).json()["error"]["message"]
    assert "max_completion_tokens" in message
    assert all(number in message for number in ("62", "3 tokens", "64", "61"))


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("POST", "/v1/chat/completions/", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/org/other", 404, "model_not_found"),
    ],
)
def test_unknown_routes_and_methods(client: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_models_health_and_stats(client: httpx.Client) -> None:
    card = {
        "id": "tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "tokenloft",
        "max_model_len": MAX_MODEL_LEN,
    }
    assert client.get("/v1/models").json() == {"object": "list", "data": [card]}
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/health").json() == {"status": "ok", "model": "tiny"}
    assert client.get("/warehouse/stats").json() == {"num_blocks": 3}


def test_until_the_model_is_ready_health_and_chat_say_so() -> None:
    with client_of(ScriptedBackend(ready=False), HttpSettings(retry_after_s=7)) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        chat = client.post(CHAT, json=BODY)
        assert (chat.status_code, chat.json()["error"]["code"]) == (503, "model_not_ready")
        assert chat.headers["retry-after"] == "7"


def test_keys_guard_everything_but_health() -> None:
    settings = HttpSettings(api_key_hashes=frozenset({hash_api_key("sésame"), hash_api_key("other")}))
    with client_of(ScriptedBackend(), settings) as client:
        assert client.get("/health").status_code == 200
        for header in (None, "Bearer wrong", "sésame", "Basic sésame", "Bearer"):
            headers = {} if header is None else {b"authorization": header.encode()}
            for response in (
                client.get("/v1/models", headers=headers),
                client.get("/metrics", headers=headers),
                client.post(CHAT, headers=headers),
                client.post("/v1/completions", headers=headers),
            ):
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in ("sésame", "other"):
            response = client.post(CHAT, json=BODY, headers={b"authorization": f"Bearer {key}".encode()})
            assert response.status_code == 200


def test_what_the_client_says_reaches_the_backend() -> None:
    backend = ScriptedBackend()
    with client_of(backend) as client:
        asked = {"seed": -5, "temperature": 0, "stop": "x", "max_tokens": 61, "tokenloft": {"cache": False}}
        client.post(CHAT, json={**BODY, **asked}, headers={"x-session-id": "s-1"}).raise_for_status()
        client.post(CHAT, json=BODY).raise_for_status()
    told, untold = backend.calls
    assert told["sampling"] == SamplingParams(61, temperature=0.0, seed=-5, stop=("x",))
    assert (told["session_id"], told["use_cache"]) == ("s-1", False)
    assert (untold["session_id"], untold["use_cache"]) == (None, True)
    assert untold["sampling"].max_tokens == MAX_MODEL_LEN - 3
    assert 0 <= untold["sampling"].seed < 2**63
    assert told["request_id"] != untold["request_id"]


def test_request_ids_are_echoed_outside_and_unique_inside() -> None:
    backend = ScriptedBackend()
    with client_of(backend) as client:
        headers = [{"x-request-id": "mine-1"}, {"x-request-id": "mine-1"}, {"x-request-id": "no good"}]
        responses = [client.post(CHAT, json=BODY, headers=sent) for sent in headers]
        assert client.get("/nothing").headers["x-request-id"]
    echoed = [response.headers["x-request-id"] for response in responses]
    inside = [call["request_id"] for call in backend.calls]
    assert echoed == ["mine-1", "mine-1", inside[2]]
    assert len(set(inside)) == 3
    assert [response.json()["id"] for response in responses] == [f"chatcmpl-{one}" for one in inside]


def test_the_official_client_gets_whole_answers_streams_and_errors() -> None:
    with serving(ScriptedBackend()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as official:
        whole = official.chat.completions.create(**BODY)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Hello, wörld", "stop")
        assert whole.created == 42
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 2

        chunks = list(official.chat.completions.create(**BODY, stream=True, stream_options={"include_usage": True}))
        deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == "Hello, wörld"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 6
        assert {chunk.id for chunk in chunks} == {chunks[0].id}

        with pytest.raises(openai.NotFoundError) as caught:
            official.chat.completions.create(**{**BODY, "model": "gpt-9"})
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert [model.id for model in official.models.list()] == ["tiny"]


def test_the_first_token_does_not_wait_for_the_second() -> None:
    backend = ScriptedBackend(texts=("first",), script=ENDLESS)
    with client_of(backend) as client, client.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["content"] == "first"
        assert not backend.closed.is_set()


@pytest.mark.parametrize("script", [ENDLESS, SILENT])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_the_work(script: str, stream: bool) -> None:
    backend = ScriptedBackend(script=script)
    body = json.dumps({**BODY, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with serving(backend) as url:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), WAIT_S) as connection:
            connection.sendall(head.encode() + body)
            assert backend.begun.wait(WAIT_S)
            if stream and script == ENDLESS:
                assert connection.recv(15) == b"HTTP/1.1 200 OK"
            assert not backend.closed.is_set()
        assert backend.closed.wait(WAIT_S)


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_before_the_first_token_has_a_status_of_its_own(stream: bool) -> None:
    failure = ApiError(503, "All replicas are busy.", code="overloaded", headers={"retry-after": "3"})
    with client_of(ScriptedBackend(texts=(), failure=failure)) as client:
        response = client.post(CHAT, json={**BODY, "stream": stream})
        assert (response.status_code, response.headers["retry-after"]) == (503, "3")
        assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [True, False])
def test_an_internal_failure_tells_the_log_everything_and_the_client_nothing(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = ScriptedBackend(failure=LookupError("secret path"))
    with client_of(backend) as client:
        response = client.post(CHAT, json={**BODY, "stream": stream})
        assert client.get("/health").status_code == 200
    error = events_of(response)[-1]["error"] if stream else response.json()["error"]
    assert response.status_code == (200 if stream else 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert backend.calls[0]["request_id"] in error["message"]
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "secret path" in caplog.text
    assert backend.closed.is_set()


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    failure = ApiError(503, "The replica has gone.", code="replica_gone")
    with client_of(ScriptedBackend(failure=failure)) as client:
        events = events_of(client.post(CHAT, json={**BODY, "stream": True}))
    assert [event["choices"][0]["delta"]["content"] for event in events[1:-1]] == ["Hello", ", ", "wörld"]
    assert events[-1]["error"] == {
        "message": "The replica has gone.",
        "type": "server_error",
        "param": None,
        "code": "replica_gone",
    }
