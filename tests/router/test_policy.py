"""Decisions on hand-made views: prefix, cost, overload, fallback, prefill place, and their reasons."""

from random import Random
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.events import ReplicaLoad
from cache.hashing import BlockHash
from router.cost import CostModel
from router.holdings import IN_DISK, IN_DRAM, NOT_HERE, Holdings
from router.policy import Decision, PolicyConfig, ReplicaView, RouteRequest, RouterView, decide

BLOCK_SIZE = 32
COSTS = CostModel(bytes_per_token=46_080, prefill_tokens_per_s=300)


def request(num_tokens: int, session_id: str | None = None) -> RouteRequest:
    hashes = tuple(BlockHash(i.to_bytes(16, "big")) for i in range(num_tokens // BLOCK_SIZE))
    return RouteRequest(num_tokens, hashes, BLOCK_SIZE, session_id)


def replica(
    name: str,
    node: str = "n",
    role: Literal["prefill", "decode"] = "decode",
    running: int = 0,
    queued_tokens: int = 0,
    in_flight: int = 0,
    in_flight_tokens: int = 0,
    speed: float = 0.0,
    is_stale: bool = False,
) -> ReplicaView:
    load = ReplicaLoad(name, role, running, 0, queued_tokens, speed, 0.0)
    return ReplicaView(node, load, in_flight, in_flight_tokens, is_stale)


def choose(
    asked: RouteRequest,
    *replicas: ReplicaView,
    devices: dict[str, int] | None = None,
    nodes: dict[str, bytes] | None = None,
    config: PolicyConfig | None = None,
    seed: int = 0,
) -> Decision:
    view = RouterView(replicas, Holdings(devices or {}, nodes or {}))
    return decide(asked, view, COSTS, config or PolicyConfig(), Random(seed))


def test_longest_prefix_wins_and_says_so() -> None:
    decision = choose(request(2_100), replica("a"), replica("b"), devices={"a": 10, "b": 64})
    assert decision.decode_replica == "b"
    assert decision.reason == "longest prefix: 2,048 of 2,100 tokens on device"
    assert [each.device_tokens for each in decision.candidates] == [320, 2048]


def test_reason_names_every_tier_that_is_read() -> None:
    nodes = {"n": bytes([NOT_HERE] + [IN_DRAM] * 2 + [IN_DISK]), "m": bytes([NOT_HERE] * 3 + [IN_DISK])}
    decision = choose(request(200), replica("a"), devices={"a": 1}, nodes=nodes)
    assert decision.reason == "longest prefix: 128 of 200 tokens (32 on device, 64 in dram, 32 on disk)"
    (candidate,) = decision.candidates
    assert candidate.load_s == pytest.approx(64 * 46_080 / 4e9 + 32 * 46_080 / 6e8)
    assert candidate.compute_s == pytest.approx(72 / 300)
    assert candidate.total_s == pytest.approx(candidate.load_s + candidate.compute_s + candidate.queue_s)


def test_prefix_on_the_node_beats_prefix_on_another_node() -> None:
    nodes = {"m": bytes([IN_DISK] * 60)}
    decision = choose(request(2_000), replica("a", "n"), replica("b", "m"), nodes=nodes)
    assert decision.decode_replica == "b"
    assert next(each for each in decision.candidates if each.replica_id == "a").remote_tokens == 1920


def test_prefix_of_a_node_without_a_decode_replica_is_no_reason_to_crowd() -> None:
    nodes = {"m": bytes([IN_DRAM] * 60)}
    decision = choose(request(2_000), replica("a", running=1), replica("b"), nodes=nodes)
    assert (decision.decode_replica, decision.reason) == ("b", "prefix on other nodes only: least loaded")


def test_a_small_gain_does_not_move_a_session_a_large_one_does() -> None:
    asked = request(320)
    held = {"a": 5, "b": 4}
    # 32 tokens more to compute are 0.11 s: less waiting than that is no reason to move.
    stay = choose(asked, replica("a", queued_tokens=35), replica("b"), devices=held)
    assert stay.decode_replica == "a"
    move = choose(asked, replica("a", queued_tokens=600), replica("b"), devices=held)
    assert move.decode_replica == "b"
    assert move.reason == "cheaper: 1.89 s less than at the replica with the longest prefix"


def test_overload_ends_affinity_at_the_factor() -> None:
    config = PolicyConfig(overload_factor=2, margin_s=1000)
    held = {"a": 60}
    at_limit = choose(request(2_000), replica("a", running=4), replica("b", running=1), devices=held, config=config)
    assert at_limit.decode_replica == "a", "4 is not more than 2 x (1 + 1)"
    over = choose(request(2_000), replica("a", running=5), replica("b", running=1), devices=held, config=config)
    assert over.decode_replica == "b"
    assert over.reason == "overload: 5 requests at the replica with the longest prefix, 1 at the least loaded"


def test_what_this_gateway_sent_counts_before_it_is_reported() -> None:
    config = PolicyConfig(overload_factor=1)
    decision = choose(request(100), replica("a", in_flight=2), replica("b"), devices={"a": 3}, config=config)
    assert decision.decode_replica == "b"
    assert replica("a", running=3, in_flight=2).num_requests == 3
    assert replica("a", queued_tokens=10, in_flight_tokens=50).queued_tokens == 50


def test_no_prefix_goes_to_the_least_loaded_among_about_equal_costs() -> None:
    decision = choose(request(100), replica("a", running=1, speed=310), replica("b", speed=300))
    assert (decision.decode_replica, decision.reason) == ("b", "no prefix anywhere: least loaded")


def test_new_sessions_spread_over_idle_replicas_although_one_is_a_little_faster() -> None:
    replicas = (replica("a", speed=303), replica("b", speed=300))
    chosen = {choose(request(100, f"session {i}"), *replicas).decode_replica for i in range(20)}
    assert chosen == {"a", "b"}


@given(st.text(max_size=8), st.integers(), st.integers())
def test_a_session_meets_the_same_tie_break_in_every_gateway(session_id: str, seed: int, other_seed: int) -> None:
    replicas = (replica("a"), replica("b"), replica("c"))
    asked = request(100, session_id)
    assert choose(asked, *replicas, seed=seed) == choose(asked, *replicas, seed=other_seed)


def test_a_stale_replica_is_weighed_by_what_was_sent_to_it_alone() -> None:
    stale = replica("a", "m", running=9, queued_tokens=9_000, in_flight=1, is_stale=True)
    assert (stale.num_requests, stale.queued_tokens) == (1, 0)
    decision = choose(request(100), stale, replica("b"), devices={"b": 3})
    assert decision.reason.startswith("longest prefix")


def test_without_fresh_news_the_less_loaded_of_two_is_taken() -> None:
    replicas = [replica("a", in_flight=5, is_stale=True), replica("b", is_stale=True)]
    decision = choose(request(100), *replicas)
    assert (decision.decode_replica, decision.reason) == ("b", "no fresh news from any node: least loaded of two")
    idle = [replica(name, is_stale=True) for name in "abcd"]
    assert len({choose(request(100), *idle, seed=seed).decode_replica for seed in range(40)}) == 4


def test_knowing_no_replica_leaves_the_choice_to_serve() -> None:
    assert choose(request(100)) == Decision.any()
    assert choose(request(100), replica("p", role="prefill")) == Decision.any()


def test_a_long_rest_goes_to_the_prefill_replica_that_is_done_first() -> None:
    asked = request(2_000)
    replicas = (replica("d"), replica("p", role="prefill", queued_tokens=500), replica("q", role="prefill"))
    decision = choose(asked, *replicas)
    assert (decision.decode_replica, decision.prefill_replica, decision.prefill_remote) == ("d", "q", True)
    with_prefix = choose(asked, *replicas, devices={"p": 50})
    assert with_prefix.prefill_replica == "p", "1,600 tokens less to compute are worth a queue of 500"


def test_a_short_rest_stays_at_decode() -> None:
    replicas = (replica("d"), replica("p", role="prefill"))
    config = PolicyConfig(remote_threshold_tokens=500)
    stored = {"n": bytes([IN_DRAM] * 50)}
    short = choose(request(2_000), *replicas, nodes=stored, config=config)
    assert (short.prefill_remote, short.prefill_replica) == (False, "p")
    assert choose(request(2_100), *replicas, nodes=stored, config=config).prefill_remote


def test_prefill_that_would_compute_the_prefix_again_is_not_asked() -> None:
    replicas = (replica("d"), replica("p", role="prefill"))
    config = PolicyConfig(remote_threshold_tokens=500)
    # Only the decode replica's own pool has the prefix: prefill would compute 2,100 tokens instead of 500.
    assert not choose(request(2_100), *replicas, devices={"d": 50}, config=config).prefill_remote


def test_decode_computes_itself_when_prefill_is_swamped() -> None:
    swamped = replica("p", role="prefill", queued_tokens=20_000)
    assert not choose(request(2_000), replica("d"), swamped).prefill_remote


def test_a_wholly_stored_prompt_still_has_its_last_token_computed() -> None:
    (candidate,) = choose(request(64), replica("a"), devices={"a": 2}).candidates
    assert candidate.compute_s == pytest.approx(1 / 300)


@pytest.mark.parametrize("config", [{"overload_factor": 0.5}, {"margin_s": -1.0}, {"remote_threshold_tokens": -1}])
def test_config_outside_its_range_is_refused(config: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"overload_factor is 0\.5, it must be at least 1|negative value"):
        PolicyConfig(**config)  # type: ignore[arg-type]


views = st.lists(
    st.builds(
        replica,
        st.sampled_from(["a", "b", "c", "p"]),
        st.sampled_from(["n", "m"]),
        st.sampled_from(["prefill", "decode"]),
        st.integers(0, 20),
        st.integers(0, 9_000),
        in_flight=st.integers(0, 20),
        is_stale=st.booleans(),
    ),
    max_size=4,
    unique_by=lambda each: each.replica_id,
)


@given(st.integers(1, 400), views, st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 12)))
def test_the_choice_is_a_decode_replica_that_is_not_overloaded(
    num_tokens: int, replicas: list[ReplicaView], devices: dict[str, int]
) -> None:
    asked = request(num_tokens)
    devices = {name: min(held, len(asked.block_hashes)) for name, held in devices.items()}
    decision = choose(asked, *replicas, devices=devices)
    decodes = {each.replica_id: each for each in replicas if each.load.role == "decode"}
    assert {each.replica_id for each in decision.candidates} == set(decodes)
    if not decodes:
        assert decision.decode_replica is None
        return
    assert decision.decode_replica in decodes
    if not all(each.is_stale for each in decodes.values()):
        least = min(each.num_requests for each in decodes.values())
        assert decodes[decision.decode_replica].num_requests <= 2 * (least + 1)
