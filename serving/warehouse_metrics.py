"""The warehouse's and the engines' state as Prometheus metrics, from what `Backend.warehouse_stats` says.

Pure. A node store or an engine that can't be asked is `up 0` and has no other figures: they are unknown, not 0.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

_BYTES = {"dram": "dram_bytes", "disk": "disk_bytes", "handoff": "handoff_bytes"}
_BUDGETS = {"dram": "dram_budget_bytes", "disk": "disk_budget_bytes", "handoff": "handoff_budget_bytes"}
_COUNTS = {
    "num_extents": "Extents stored.",
    "num_blocks": "Blocks stored.",
    "dirty_bytes": "Bytes that are not on disk yet.",
}


def warehouse_metrics(stats: Mapping[str, Any]) -> Iterator[Metric]:
    """All metrics of `stats`."""
    yield from _store_metrics(stats.get("stores", ()))
    yield _engine_metric(stats.get("engines", {}))


def _store_metrics(stores: list[Mapping[str, Any]]) -> Iterator[Metric]:
    up = GaugeMetricFamily("tokenloft_node_store_up", "1 if the node store answers.", labels=["node"])
    degraded = GaugeMetricFamily("tokenloft_node_store_degraded", "1 if its disk tier is down.", labels=["node"])
    held = GaugeMetricFamily("tokenloft_warehouse_bytes", "Bytes held.", labels=["node", "tier"])
    budget = GaugeMetricFamily("tokenloft_warehouse_budget_bytes", "Most bytes held.", labels=["node", "tier"])
    counts = {
        key: GaugeMetricFamily(f"tokenloft_warehouse_{key}", text, labels=["node"]) for key, text in _COUNTS.items()
    }
    events = CounterMetricFamily("tokenloft_warehouse_events", "What the node store has done.", labels=["node", "kind"])
    for store in stores:
        node = str(store["node_id"])
        state = str(store["state"])
        is_up = not state.startswith("unavailable")
        up.add_metric([node], is_up)
        if not is_up:
            continue
        degraded.add_metric([node], state != "ok")
        for tier in _BYTES:
            held.add_metric([node, tier], store[_BYTES[tier]])
            budget.add_metric([node, tier], store[_BUDGETS[tier]])
        for key, metric in counts.items():
            metric.add_metric([node], store[key])
        for kind, count in store["counters"].items():
            events.add_metric([node, kind], count)
    yield from (up, degraded, held, budget, *counts.values(), events)


def _engine_metric(engines: Mapping[str, Any]) -> Metric:
    """Every figure of every engine: they are named by the engine, so a new one needs no change here."""
    metric = GaugeMetricFamily(
        "tokenloft_engine", "Counters since the start and the present load.", labels=["role", "replica", "figure"]
    )
    for role, replicas in engines.items():
        if not isinstance(replicas, list):  # a sentence that says why there are none
            continue
        for number, figures in enumerate(replicas):
            for name, value in figures.items():
                metric.add_metric([role, str(number), name], value)
    return metric
