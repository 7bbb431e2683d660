import asyncio
from collections.abc import AsyncGenerator, Mapping

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.http_metrics import Metrics
from serving.protocol import TokenBatch, Usage
from tests.serving.http_server import BODY, CHAT, TEXT, TEXT_BODY, ScriptedBackend, client_of

Samples = Mapping[tuple[str, tuple[str, ...]], float]


def samples_of(text: str) -> Samples:
    """Values by name and label values. Fails on anything that is not Prometheus' format."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(client: httpx.Client) -> Samples:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return samples_of(response.text)


def test_requests_are_counted_by_endpoint_and_status() -> None:
    with client_of(ScriptedBackend()) as client:
        for _ in range(2):
            client.post(CHAT, json=BODY)
        client.post(CHAT, json={})
        client.post(TEXT, json={**TEXT_BODY, "prompt": ["a", "b"], "n": 2})
        client.get("/made/up")
        client.get("/v1/models/none")
        samples = scrape(client)
    requests = "tokenloft_http_requests_total"
    assert samples[requests, (CHAT, "200")] == 2
    assert samples[requests, (CHAT, "400")] == 1
    assert samples[requests, (TEXT, "200")] == 1
    assert samples[requests, ("other", "404")] == 2
    assert samples["tokenloft_http_requests_in_flight", (CHAT,)] == 0
    assert samples["tokenloft_http_requests_in_flight", ("/metrics",)] == 1
    assert samples["tokenloft_http_request_seconds_count", (CHAT,)] == 2
    # One first token for each prompt; between the three tokens of each choice there are two pauses.
    assert samples["tokenloft_time_to_first_token_seconds_count", (CHAT,)] == 2
    assert samples["tokenloft_time_to_first_token_seconds_count", (TEXT,)] == 2
    assert samples["tokenloft_time_between_batches_seconds_count", (CHAT,)] == 4
    assert samples["tokenloft_time_between_batches_seconds_count", (TEXT,)] == 8
    assert samples["tokenloft_generated_tokens_total", ()] == 2 * 3 + 4 * 3
    assert samples["tokenloft_prompt_tokens_total", ("device",)] == 4 * 2


def test_two_apps_do_not_share_their_counts() -> None:
    with client_of(ScriptedBackend()) as one, client_of(ScriptedBackend()) as other:
        one.post(CHAT, json=BODY)
        assert ("tokenloft_http_requests_total", (CHAT, "200")) not in scrape(other)


def test_until_the_model_is_ready_there_are_metrics_all_the_same() -> None:
    with client_of(ScriptedBackend(ready=False)) as client:
        assert client.post(CHAT, json=BODY).status_code == 503
        assert scrape(client)["tokenloft_http_requests_total", (CHAT, "503")] == 1


def test_times_and_origins_of_one_prompt() -> None:
    clock = [100.0]
    usage = Usage(
        prompt_tokens=60, completion_tokens=3, device_tokens=1, dram_tokens=2, disk_tokens=3, remote_tokens=4,
        prefill_tokens=5, decode_computed_tokens=6, saved_s=1.5,
    )  # fmt: skip

    async def batches() -> AsyncGenerator[TokenBatch, None]:
        clock[0] += 0.25
        yield TokenBatch((1,), "a")
        clock[0] += 0.5
        yield TokenBatch((1,), "b", choice=1)
        clock[0] += 0.125
        yield TokenBatch((2, 3), "c", "stop", usage)
        clock[0] += 0.0625
        yield TokenBatch((), "", "stop", usage, 1)

    metrics = Metrics(lambda: clock[0])

    async def main() -> list[TokenBatch]:
        began_at = metrics.request_began("here")
        clock[0] += 1.0
        passed = [batch async for batch in metrics.watched(batches(), "here", began_at)]
        metrics.request_ended("here", 200, began_at)
        return passed

    assert [batch.text for batch in asyncio.run(main())] == ["a", "b", "c", ""]
    samples = samples_of(metrics.text().decode())
    assert samples["tokenloft_time_to_first_token_seconds_sum", ("here",)] == 1.25
    assert samples["tokenloft_time_between_batches_seconds_sum", ("here",)] == 0.625
    assert samples["tokenloft_http_request_seconds_sum", ("here",)] == pytest.approx(1.9375)
    assert samples["tokenloft_generated_tokens_total", ()] == 4
    assert samples["tokenloft_saved_seconds_total", ()] == 1.5
    origins = ("device", "dram", "disk", "remote", "prefill", "decode")
    assert [samples["tokenloft_prompt_tokens_total", (origin,)] for origin in origins] == [1, 2, 3, 4, 5, 6]
