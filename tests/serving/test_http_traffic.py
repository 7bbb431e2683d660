"""The bound on requests in progress, over a real socket."""

from concurrent.futures import ThreadPoolExecutor

from serving.http_settings import HttpSettings
from tests.serving.http_server import BODY, CHAT, ENDLESS, TEXT, TEXT_BODY, WAIT_S, ScriptedBackend, client_of


def test_one_request_too_many_is_told_to_come_back_later() -> None:
    backend = ScriptedBackend(script=ENDLESS)
    with client_of(backend, HttpSettings(max_requests=1)) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, CHAT, json=BODY)
        assert backend.begun.wait(WAIT_S)
        for path, body in ((CHAT, BODY), (TEXT, TEXT_BODY), (CHAT, {**BODY, "stream": True})):
            refused = client.post(path, json=body)
            error = refused.json()["error"]
            assert (refused.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["x-request-id"]
            assert "at most 1 requests" in error["message"]
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 200
        backend.released.set()
        assert first.result(WAIT_S).status_code == 200
        assert client.post(CHAT, json=BODY).status_code == 200
        assert len(backend.calls) == 2


def test_a_refused_large_body_does_not_break_the_connection() -> None:
    backend = ScriptedBackend(script=ENDLESS)
    with client_of(backend, HttpSettings(max_requests=1)) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, CHAT, json=BODY)
        assert backend.begun.wait(WAIT_S)
        for _ in range(3):
            assert client.post(CHAT, json={**BODY, "user": "x" * 1_000_000}).status_code == 429
        backend.released.set()
        assert first.result(WAIT_S).status_code == 200


def test_failed_and_broken_off_requests_give_their_place_back() -> None:
    backend = ScriptedBackend(script=ENDLESS)
    with client_of(backend, HttpSettings(max_requests=1)) as client:
        assert client.post(CHAT, json={}).status_code == 400
        for _ in range(3):
            backend.closed.clear()
            with client.stream("POST", CHAT, json={**BODY, "stream": True}) as response:
                assert response.status_code == 200
                assert next(response.iter_lines())
            assert backend.closed.wait(WAIT_S)
            while 'in_flight{endpoint="/v1/chat/completions"} 0.0' not in client.get("/metrics").text:
                pass
