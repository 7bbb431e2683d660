import dataclasses
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cache.messages import StoreStats
from serving.http_metrics import Metrics
from serving.warehouse_metrics import warehouse_metrics
from tests.serving.http_server import ScriptedBackend, client_of

STORE = dataclasses.asdict(
    StoreStats(
        node_id="node-1", directory="/somewhere", state="ok", num_extents=2, num_blocks=9, dram_bytes=100,
        dram_budget_bytes=1000, disk_bytes=300, disk_budget_bytes=3000, handoff_bytes=5, handoff_budget_bytes=50,
        dirty_bytes=40, num_recovered_blocks=0, counters={"evicted_blocks": 7, "hits": 3},
    )
)  # fmt: skip
STATS: dict[str, Any] = {
    "stores": [
        STORE,
        {**STORE, "node_id": "node-2", "state": "degraded: the disk is full"},
        {"node_id": "node-3", "state": "unavailable: it has died"},
    ],
    "engines": {"decode": [{"num_waiting": 2, "decode_step_s": 0.05}], "prefill": "unavailable: timeout"},
}


class Samples:
    """What a scrape says."""

    def __init__(self, text: str) -> None:
        self.all = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def get(self, name: str, **labels: str) -> float | None:
        """The value of one sample, None if there is none."""
        found = [sample.value for sample in self.all if (sample.name, sample.labels) == (name, labels)]
        assert len(found) <= 1
        return found[0] if found else None


def test_tiers_budgets_and_counters() -> None:
    samples = Samples(Metrics().text(warehouse_metrics(STATS)).decode())
    held = {tier: samples.get("tokenloft_warehouse_bytes", node="node-1", tier=tier) for tier in ("dram", "disk")}
    assert held == {"dram": 100, "disk": 300}
    assert samples.get("tokenloft_warehouse_budget_bytes", node="node-1", tier="handoff") == 50
    assert samples.get("tokenloft_warehouse_num_blocks", node="node-1") == 9
    assert samples.get("tokenloft_warehouse_dirty_bytes", node="node-1") == 40
    assert samples.get("tokenloft_warehouse_events_total", node="node-1", kind="evicted_blocks") == 7
    assert samples.get("tokenloft_engine", role="decode", replica="0", figure="decode_step_s") == 0.05


def test_trouble_shows() -> None:
    samples = Samples(Metrics().text(warehouse_metrics(STATS)).decode())
    nodes = ("node-1", "node-2", "node-3")
    assert [samples.get("tokenloft_node_store_up", node=node) for node in nodes] == [1, 1, 0]
    assert [samples.get("tokenloft_node_store_degraded", node=node) for node in nodes] == [0, 1, None]
    assert {sample.name for sample in samples.all if sample.labels.get("node") == "node-3"} == {
        "tokenloft_node_store_up"
    }
    assert {sample.labels["role"] for sample in samples.all if sample.name == "tokenloft_engine"} == {"decode"}


def test_they_are_part_of_a_scrape() -> None:
    with client_of(ScriptedBackend(stats=STATS)) as client:
        text = client.get("/metrics").text
    assert Samples(text).get("tokenloft_warehouse_bytes", node="node-1", tier="dram") == 100
    assert "/somewhere" not in text
