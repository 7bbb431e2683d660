"""Chooses where a request runs: pure, the same code in the gateway and in a simulation.

Every replica is weighed in seconds: load what is stored, compute the rest, wait for what is ahead. A session
stays where its longest prefix is (moving costs more than a small gain), except when that replica is overloaded.
Nothing here reads a clock, keeps state, or knows how a request travels.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from cache.events import ReplicaLoad, Tier
from cache.hashing import BlockHash
from router.cost import REMOTE, CostModel
from router.holdings import Holdings, Sources


@dataclass(frozen=True, slots=True)
class Candidate:
    """One decode replica weighed for one request. Tokens say where the prompt's KV would come from."""

    replica_id: str
    node_id: str
    device_tokens: int
    dram_tokens: int
    disk_tokens: int
    remote_tokens: int
    """Held by another node's store only."""
    load_s: float
    """To bring stored tokens, and those that a prefill replica hands off, into the pool."""
    compute_s: float
    queue_s: float
    """Work ahead of this request, and the steps of what is decoding."""
    total_s: float

    @property
    def local_tokens(self) -> int:
        return self.device_tokens + self.dram_tokens + self.disk_tokens

    @property
    def found_tokens(self) -> int:
        return self.local_tokens + self.remote_tokens


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes and why."""

    decode_replica: str | None
    """None: any, by Serve's own power of two."""
    prefill_replica: str | None
    """The best one even if the rest looks short: decode plans again on arrival. None if there is none."""
    prefill_remote: bool
    """True: the rest is long enough for a prefill replica."""
    reason: str
    """One sentence fragment for people."""
    candidates: tuple[Candidate, ...] = ()

    @classmethod
    def any(cls) -> "Decision":
        """The decision of a router that knows nothing."""
        return cls(None, None, False, "no information: power of two on load")


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What the policy may know of a request."""

    num_tokens: int
    """Length of the prompt."""
    block_hashes: tuple[BlockHash, ...]
    """Hashes of its full blocks."""
    block_size: int
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica at the moment of a decision: what it reported, and what this gateway has sent to it."""

    node_id: str
    load: ReplicaLoad
    num_in_flight: int = 0
    in_flight_tokens: int = 0
    """Prompt tokens sent to it that it has still to compute."""
    is_stale: bool = False
    """True: its node has gone silent, so only what was sent from here counts."""

    @property
    def replica_id(self) -> str:
        return self.load.replica_id

    @property
    def num_requests(self) -> int:
        """Requests there. The report knows other gateways' too but is late; ours is never late."""
        reported = 0 if self.is_stale else self.load.num_running + self.load.num_waiting
        return max(reported, self.num_in_flight)

    @property
    def queued_tokens(self) -> int:
        reported = 0 if self.is_stale else self.load.queued_prefill_tokens
        return max(reported, self.in_flight_tokens)


@dataclass(frozen=True, slots=True)
class RouterView:
    """All that a decision is made from."""

    replicas: tuple[ReplicaView, ...] = ()
    holdings: Holdings = field(default_factory=Holdings)

    def with_role(self, role: Literal["prefill", "decode"]) -> tuple[ReplicaView, ...]:
        return tuple(replica for replica in self.replicas if replica.load.role == role)


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Knobs of the policy. Raises ValueError for a value outside its range."""

    remote_threshold_tokens: int = 512
    """From so many uncached tokens on, a prefill replica computes them."""
    max_remote_slowdown: float = 2.0
    """Decode computes itself when the prefill replicas' queues make them slower than this many times itself."""
    overload_factor: float = 2.0
    """A replica with more than factor x (least loaded + 1) requests gets no new one."""
    margin_s: float = 0.05
    margin_ratio: float = 0.1
    """Costs within max(margin_s, margin_ratio x cheapest) count as equal."""

    def __post_init__(self) -> None:
        if self.overload_factor < 1:
            raise ValueError(f"overload_factor is {self.overload_factor}, it must be at least 1")
        if min(self.remote_threshold_tokens, self.max_remote_slowdown, self.margin_s, self.margin_ratio) < 0:
            raise ValueError(f"negative value in {self}")


@dataclass(frozen=True, slots=True)
class _Weighed:
    candidate: Candidate
    num_requests: int
    prefill_remote: bool
    tie_break: float


@dataclass(frozen=True, slots=True)
class _PrefillPlace:
    """The prefill replica that would be done first."""

    replica_id: str
    node_id: str
    compute_s: float
    queue_s: float


def decide(request: RouteRequest, view: RouterView, costs: CostModel, config: PolicyConfig, rng: Random) -> Decision:
    """Weigh all decode replicas and choose one. `rng` breaks ties and draws the pair of the fallback."""
    decodes = view.with_role("decode")
    if not decodes:
        return Decision.any()
    prefill = _best_prefill(request, view, costs)
    prefill_replica = prefill.replica_id if prefill else None
    weighed = [_weigh(request, replica, view.holdings, prefill, costs, config, rng) for replica in decodes]
    if all(replica.is_stale for replica in decodes):
        chosen = _least_loaded_of_two(weighed, rng)
        reason = "no fresh news from any node: least loaded of two"
    else:
        chosen, reason = _choose(request, weighed, config)
    candidates = tuple(each.candidate for each in weighed)
    return Decision(chosen.candidate.replica_id, prefill_replica, chosen.prefill_remote, reason, candidates)


def _weigh(
    request: RouteRequest,
    replica: ReplicaView,
    holdings: Holdings,
    prefill: _PrefillPlace | None,
    costs: CostModel,
    config: PolicyConfig,
    rng: Random,
) -> _Weighed:
    own = costs.measured(replica.load)
    found = holdings.sources(replica.replica_id, replica.node_id)
    device, dram, disk, remote = (
        num_blocks * request.block_size
        for num_blocks in (found.device_blocks, found.dram_blocks, found.disk_blocks, found.remote_blocks)
    )
    rest = _tokens_to_compute(request, found.num_blocks)
    load_s = _seconds_to_load(found, request.block_size, own)
    queue_s = own.seconds_to_compute(replica.queued_tokens) + replica.num_requests * own.decode_step_s
    compute_s = own.seconds_to_compute(rest, request.num_tokens - rest)
    prefill_remote = False
    if prefill is not None and rest >= config.remote_threshold_tokens:
        handoff_s = own.seconds_to_load(Tier.DRAM if prefill.node_id == replica.node_id else REMOTE, rest)
        remote_s = prefill.queue_s + prefill.compute_s + handoff_s
        prefill_remote = remote_s <= config.max_remote_slowdown * (queue_s + compute_s)
        if prefill_remote:
            # The decode replica's own prefill queue is passed by; its decoding steps are not.
            queue_s = prefill.queue_s + replica.num_requests * own.decode_step_s
            compute_s, load_s = prefill.compute_s, load_s + handoff_s
    candidate = Candidate(
        replica.replica_id,
        replica.node_id,
        device,
        dram,
        disk,
        remote,
        load_s,
        compute_s,
        queue_s,
        total_s=load_s + compute_s + queue_s,
    )
    tie_break = _tie_break(request.session_id, replica.replica_id, rng)
    return _Weighed(candidate, replica.num_requests, prefill_remote, tie_break)


def _best_prefill(request: RouteRequest, view: RouterView, costs: CostModel) -> _PrefillPlace | None:
    def place(replica: ReplicaView) -> _PrefillPlace:
        own = costs.measured(replica.load)
        found = view.holdings.sources(replica.replica_id, replica.node_id)
        load_s = _seconds_to_load(found, request.block_size, own)
        rest = _tokens_to_compute(request, found.num_blocks)
        compute_s = load_s + own.seconds_to_compute(rest, request.num_tokens - rest)
        return _PrefillPlace(
            replica.replica_id, replica.node_id, compute_s, own.seconds_to_compute(replica.queued_tokens)
        )

    fresh_first = sorted(view.with_role("prefill"), key=lambda replica: replica.is_stale)
    return min(map(place, fresh_first), key=lambda each: each.queue_s + each.compute_s, default=None)


def _seconds_to_load(found: Sources, block_size: int, costs: CostModel) -> float:
    from_dram_s = costs.seconds_to_load(Tier.DRAM, found.dram_blocks * block_size)
    from_disk_s = costs.seconds_to_load(Tier.DISK, found.disk_blocks * block_size)
    return from_dram_s + from_disk_s + costs.seconds_to_load(REMOTE, found.remote_blocks * block_size)


def _tokens_to_compute(request: RouteRequest, num_found_blocks: int) -> int:
    # Even a prompt that is stored as a whole has its last token computed, for the logits.
    return max(1, request.num_tokens - num_found_blocks * request.block_size)


def _choose(request: RouteRequest, weighed: Sequence[_Weighed], config: PolicyConfig) -> tuple[_Weighed, str]:
    favourite = _favourite(weighed, config)
    least = min(each.num_requests for each in weighed)
    free = [each for each in weighed if each.num_requests <= config.overload_factor * (least + 1)]
    if favourite.candidate.local_tokens == 0:
        where = "prefix on other nodes only" if favourite.candidate.remote_tokens else "no prefix anywhere"
        return _near_cheapest(free, config), f"{where}: least loaded"
    if favourite not in free:
        return _near_cheapest(free, config), (
            f"overload: {favourite.num_requests} requests at the replica with the longest prefix, "
            f"{least} at the least loaded"
        )
    cheapest = min(free, key=lambda each: (each.candidate.total_s, each.num_requests, each.tie_break))
    saved_s = favourite.candidate.total_s - cheapest.candidate.total_s
    if saved_s > _margin_s(cheapest, config):
        return cheapest, f"cheaper: {saved_s:.2f} s less than at the replica with the longest prefix"
    return favourite, _prefix_reason(request, favourite.candidate)


def _favourite(weighed: Sequence[_Weighed], config: PolicyConfig) -> _Weighed:
    """The replica with the longest prefix on its own node; among equals, the one with more of it on the device."""

    def prefix(each: _Weighed) -> tuple[int, int]:
        return each.candidate.local_tokens, each.candidate.device_tokens

    longest = max(map(prefix, weighed))
    return _near_cheapest([each for each in weighed if prefix(each) == longest], config)


def _near_cheapest(weighed: Sequence[_Weighed], config: PolicyConfig) -> _Weighed:
    """The least loaded of those that cost about the same, so that a speed measured 1 % higher does not draw all."""
    cheapest = min(weighed, key=lambda each: each.candidate.total_s)
    limit_s = cheapest.candidate.total_s + _margin_s(cheapest, config)
    near = [each for each in weighed if each.candidate.total_s <= limit_s]
    return min(near, key=lambda each: (each.num_requests, each.tie_break))


def _margin_s(cheapest: _Weighed, config: PolicyConfig) -> float:
    return max(config.margin_s, config.margin_ratio * cheapest.candidate.total_s)


def _least_loaded_of_two(weighed: Sequence[_Weighed], rng: Random) -> _Weighed:
    pair = rng.sample(weighed, min(2, len(weighed)))
    return min(pair, key=lambda each: each.num_requests)


def _tie_break(session_id: str | None, replica_id: str, rng: Random) -> float:
    """In [0, 1). The same for all turns of a session and in all gateways, so that their ties agree."""
    if session_id is None:
        return rng.random()
    digest = hashlib.blake2b(f"{session_id}\0{replica_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _prefix_reason(request: RouteRequest, candidate: Candidate) -> str:
    tiers = {
        "on device": candidate.device_tokens,
        "in dram": candidate.dram_tokens,
        "on disk": candidate.disk_tokens,
        "on another node": candidate.remote_tokens,
    }
    found = [(where, num_tokens) for where, num_tokens in tiers.items() if num_tokens]
    summary = f"longest prefix: {candidate.found_tokens:,} of {request.num_tokens:,} tokens"
    if len(found) == 1:
        return f"{summary} {found[0][0]}"
    return f"{summary} ({', '.join(f'{num_tokens:,} {where}' for where, num_tokens in found)})"
