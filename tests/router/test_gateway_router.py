"""The router as a gateway uses it: fed with event batches, asked for routes."""

from random import Random

import pytest

from cache.events import DeviceBlocks, Event, EventBatch, ExtentStored, ReplicaGone, ReplicaLoad, Tier
from cache.hashing import BlockHash, as_token_ids, chain_hashes, pack_hashes
from router.cost import CostModel
from router.gateway_router import Router
from router.mirror import Mirror
from router.policy import Decision, PolicyConfig, RouteRequest

BLOCK_SIZE = 32


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_router(clock: Clock | None = None, config: PolicyConfig | None = None) -> Router:
    costs = CostModel(bytes_per_token=1000, prefill_tokens_per_s=300)
    return Router(Mirror(clock or Clock()), costs, config or PolicyConfig(), Random(0))


def request(num_tokens: int, start: int = 0) -> RouteRequest:
    token_ids = as_token_ids(range(start, start + num_tokens))
    hashes = chain_hashes(BlockHash(bytes(16)), token_ids, BLOCK_SIZE)
    return RouteRequest(num_tokens, tuple(hashes), BLOCK_SIZE)


def decode_load(replica_id: str) -> ReplicaLoad:
    return ReplicaLoad(replica_id, "decode", 0, 0, 0, 0.0, 0.0)


def snapshot(*events: Event) -> EventBatch:
    return EventBatch("n", "e", 0, True, events)


def test_a_router_that_heard_nothing_leaves_it_to_serve() -> None:
    router = make_router()
    with router.route(request(100)) as reservation:
        assert reservation.decision == Decision.any()
        reservation.prefilled()
    assert router.known_replicas == ()


def test_computing_takes_what_the_fastest_measured_replica_takes() -> None:
    router = make_router()
    router.apply(snapshot(decode_load("a")))
    assert router.seconds_to_compute(600) == pytest.approx(2), "as assumed"
    slow = ReplicaLoad("b", "decode", 0, 0, 0, 200.0, 0.0)
    router.apply(snapshot(decode_load("a"), slow))
    assert router.seconds_to_compute(600) == pytest.approx(3)
    fast = ReplicaLoad("p", "prefill", 0, 0, 0, 600.0, 0.0, prefill_s_per_position=1e-6)
    router.apply(snapshot(decode_load("a"), slow, fast))
    assert router.seconds_to_compute(600) == pytest.approx(1 + 0.18)


def test_turns_go_where_the_blocks_are() -> None:
    router = make_router()
    asked = request(320)
    stored = ExtentStored("x", Tier.DISK, pack_hashes(asked.block_hashes[:4]))
    pool = DeviceBlocks("b", pack_hashes(asked.block_hashes[:8]), b"")
    router.apply(snapshot(stored, pool, decode_load("a"), decode_load("b")))
    with router.route(asked) as reservation:
        assert reservation.decision.decode_replica == "b"
        assert reservation.decision.reason == "longest prefix: 256 of 320 tokens on device"
    assert router.known_replicas == ("a", "b")


def test_the_same_prompt_follows_before_any_event_tells() -> None:
    router = make_router()
    router.apply(snapshot(decode_load("a"), decode_load("b")))
    with router.route(request(320)) as first, router.route(request(320)) as second:
        assert second.decision.decode_replica == first.decision.decode_replica
        assert second.decision.reason.startswith("longest prefix: 320 of 320")


def test_other_prompts_go_to_the_idle_replica_while_one_is_reserved() -> None:
    router = make_router()
    router.apply(snapshot(decode_load("a"), decode_load("b")))
    with router.route(request(320)) as first:
        busy = first.decision.decode_replica
        with router.route(request(320, start=5_000)) as second:
            assert second.decision.decode_replica != busy
        router.check_integrity()
    assert "nothing" in repr(router), "all reservations are gone"


def test_prefilled_frees_the_queue_but_not_the_replica() -> None:
    router = make_router()
    router.apply(snapshot(decode_load("a")))
    with router.route(request(320)) as reservation:
        assert "a=1/320" in repr(router)
        reservation.prefilled()
        assert "a=1/0" in repr(router)


def test_a_long_prompt_reserves_the_prefill_replica() -> None:
    router = make_router(config=PolicyConfig(remote_threshold_tokens=100))
    router.apply(snapshot(decode_load("d"), ReplicaLoad("p", "prefill", 0, 0, 0, 0.0, 0.0)))
    with router.route(request(320)) as reservation:
        assert reservation.decision.prefill_remote
        assert "d=1/0 p=1/320" in repr(router)


def test_a_failing_request_leaves_no_reservation() -> None:
    router = make_router()
    router.apply(snapshot(decode_load("a")))
    with pytest.raises(RuntimeError, match="hung up"), router.route(request(320)):
        raise RuntimeError("hung up")
    assert "nothing" in repr(router)


def test_explaining_reserves_and_predicts_nothing() -> None:
    router = make_router()
    router.apply(snapshot(decode_load("a")))
    before = repr(router)
    assert router.explain(request(320)).decode_replica == "a"
    assert repr(router) == before


def test_gone_replicas_get_nothing_and_a_silent_cluster_falls_back() -> None:
    clock = Clock()
    router = make_router(clock)
    router.apply(snapshot(decode_load("a"), decode_load("b")))
    router.apply(EventBatch("n", "e", 1, False, (ReplicaGone("a"),)))
    assert router.explain(request(320)).decode_replica == "b"
    clock.now_s += 60
    assert router.explain(request(320)).reason == "no fresh news from any node: least loaded of two"
    router.forget_replica("b")
    assert router.explain(request(320)) == Decision.any()
    router.forget_node("n")
    assert router.position("n") == (None, 0)
