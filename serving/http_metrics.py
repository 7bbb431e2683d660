"""What the HTTP edge counts and times, in a registry of its own. Prometheus' text format comes out.

Times are the client's: they begin when the request arrives here. Never keeps anything that a client wrote; labels
take values from fixed sets only.
"""

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.protocol import TokenBatch, Usage

_FIRST_TOKEN_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_BETWEEN_BUCKETS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """See the module's docstring. All in the event loop."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        """`monotonic` gives seconds."""
        self._now = monotonic
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "tokenloft_http_requests", "Requests answered. 499: the client left first.", ["endpoint", "status"],
            registry=registry,
        )  # fmt: skip
        self._in_flight = Gauge(
            "tokenloft_http_requests_in_flight", "Requests in progress.", ["endpoint"], registry=registry
        )
        self._request_s = Histogram(
            "tokenloft_http_request_seconds",
            "From a request's arrival to the end of its answer, refusals left out.",
            ["endpoint"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "tokenloft_prompt_tokens",
            "Prompt tokens of finished answers, by where their KV was found (device, dram, disk, remote) or computed "
            "(prefill, decode).",
            ["origin"],
            registry=registry,
        )
        self._generated_tokens = Counter("tokenloft_generated_tokens", "Tokens generated.", registry=registry)
        self._saved_s = Counter(
            "tokenloft_saved_seconds", "Estimate: computing what was reused, less loading it.", registry=registry
        )
        self._first_token_s = Histogram(
            "tokenloft_time_to_first_token_seconds", "From a request's arrival to the first token of each prompt.",
            ["endpoint"], buckets=_FIRST_TOKEN_BUCKETS, registry=registry,
        )  # fmt: skip
        self._between_s = Histogram(
            "tokenloft_time_between_batches_seconds",
            "Between two batches of tokens of one choice. A batch is one token, or what gathered under load.",
            ["endpoint"],
            buckets=_BETWEEN_BUCKETS,
            registry=registry,
        )

    def request_began(self, endpoint: str) -> float:
        """Count a request in; returns the moment, for `request_ended`."""
        self._in_flight.labels(endpoint).inc()
        return self._now()

    def request_ended(self, endpoint: str, status: int, began_at: float) -> None:
        self._in_flight.labels(endpoint).dec()
        self._requests.labels(endpoint, str(status)).inc()
        if status < HTTPStatus.BAD_REQUEST:  # a refusal is quick and would make the server look so
            self._request_s.labels(endpoint).observe(self._now() - began_at)

    async def watched(
        self, batches: AsyncGenerator[TokenBatch, None], endpoint: str, began_at: float
    ) -> AsyncGenerator[TokenBatch, None]:
        """The batches of one prompt, unchanged; closes them at its end. `began_at`: see `request_began`."""
        last_at: dict[int, float] = {}
        async with aclosing(batches):
            async for batch in batches:
                if batch.token_ids:
                    self._time(endpoint, batch.choice, began_at, last_at)
                    self._generated_tokens.inc(len(batch.token_ids))
                if batch.usage is not None and batch.choice == 0:  # the others found their prompt in the pool
                    self._count_prompt(batch.usage)
                yield batch

    def _time(self, endpoint: str, choice: int, began_at: float, last_at: dict[int, float]) -> None:
        now = self._now()
        if not last_at:
            self._first_token_s.labels(endpoint).observe(now - began_at)
        elif choice in last_at:
            self._between_s.labels(endpoint).observe(now - last_at[choice])
        last_at[choice] = now

    def _count_prompt(self, usage: Usage) -> None:
        for origin, num_tokens in {
            "device": usage.device_tokens,
            "dram": usage.dram_tokens,
            "disk": usage.disk_tokens,
            "remote": usage.remote_tokens,
            "prefill": usage.prefill_tokens,
            "decode": usage.decode_computed_tokens,
        }.items():
            self._prompt_tokens.labels(origin).inc(num_tokens)
        self._saved_s.inc(max(0.0, usage.saved_s))

    def text(self, more: Iterable[Metric] = ()) -> bytes:
        """Everything in Prometheus' text format, with `more` behind it."""
        return generate_latest(self.registry) + generate_latest(_Snapshot(more))


class _Snapshot(Collector):
    """Metrics that were computed already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
