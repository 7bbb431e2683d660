"""The gateway's router: mirror, load in flight and policy behind one lock.

A decision and what follows from it (the prediction, the reservation) are one step, so two requests at once
never both see a replica idle. It performs no I/O: whoever reads the node stores' events calls `apply`.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random

from cache.events import EventBatch
from router.cost import CostModel
from router.load import InFlight, Tracked
from router.mirror import Mirror
from router.policy import Decision, PolicyConfig, ReplicaView, RouteRequest, RouterView, decide


class Reservation:
    """A decision in force: its replicas count as busy with it until the block of `Router.route` ends."""

    def __init__(self, decision: Decision, tracked: list[Tracked], lock: threading.Lock) -> None:
        self.decision = decision
        self._tracked = tracked
        self._lock = lock

    def __repr__(self) -> str:
        return f"<Reservation {self.decision.decode_replica}: {self.decision.reason}>"

    def prefilled(self) -> None:
        """Call at the first token: the prompt no longer delays others, the decoding still does."""
        with self._lock:
            for tracked in self._tracked:
                tracked.prefilled()


class Router:
    """Decides where requests go. Thread-safe."""

    def __init__(self, mirror: Mirror, costs: CostModel, config: PolicyConfig, rng: Random) -> None:
        self._mirror = mirror
        self._costs = costs
        self._config = config
        self._rng = rng
        self._in_flight = InFlight()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        with self._lock:
            return f"<Router {self._mirror!r} {self._in_flight!r}>"

    @property
    def known_replicas(self) -> tuple[str, ...]:
        """Replicas that some node store has reported, sorted."""
        with self._lock:
            return tuple(sorted(self._mirror.loads))

    def seconds_to_compute(self, num_tokens: int) -> float:
        """Time to prefill the first tokens of a prompt, by the fastest measured replica or as assumed without one."""
        with self._lock:
            measured = [load for _, load in self._mirror.loads.values() if load.prefill_tokens_per_s]
        models = [self._costs.measured(load) for load in measured] or [self._costs]
        return min(model.seconds_to_compute(num_tokens) for model in models)

    def position(self, node_id: str) -> tuple[str | None, int]:
        """See `Mirror.position`."""
        with self._lock:
            return self._mirror.position(node_id)

    def apply(self, batch: EventBatch) -> bool:
        """See `Mirror.apply`."""
        with self._lock:
            return self._mirror.apply(batch)

    def forget_node(self, node_id: str) -> None:
        with self._lock:
            self._mirror.forget_node(node_id)

    def forget_replica(self, replica_id: str) -> None:
        with self._lock:
            self._mirror.forget_replica(replica_id)

    def explain(self, request: RouteRequest) -> Decision:
        """What `route` would decide now; nothing is reserved."""
        with self._lock:
            return self._decide(request)

    @contextmanager
    def route(self, request: RouteRequest) -> Iterator[Reservation]:
        """Decide, and reserve for as long as the block runs. The blocks to come are predicted at once."""
        with ExitStack() as stack:
            with self._lock:
                decision = self._decide(request)
                if decision.decode_replica is not None:
                    self._mirror.predict(decision.decode_replica, request.block_hashes)
                tracked = [stack.enter_context(self._in_flight.track(*at)) for at in _work(request, decision)]
            try:
                yield Reservation(decision, tracked, self._lock)
            finally:
                with self._lock:
                    stack.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if a part contradicts itself."""
        with self._lock:
            self._mirror.check_integrity()
            self._in_flight.check_integrity()

    def _decide(self, request: RouteRequest) -> Decision:
        replicas = tuple(
            ReplicaView(
                node_id,
                load,
                self._in_flight.num_requests(replica_id),
                self._in_flight.num_tokens(replica_id),
                self._mirror.is_stale(node_id),
            )
            for replica_id, (node_id, load) in self._mirror.loads.items()
        )
        view = RouterView(replicas, self._mirror.longest_prefix(request.block_hashes))
        return decide(request, view, self._costs, self._config, self._rng)


def _work(request: RouteRequest, decision: Decision) -> list[tuple[str, int]]:
    """Replica and prompt tokens to compute there, for each replica that the decision puts to work."""
    if decision.decode_replica is None:
        return []
    found = next(each.found_tokens for each in decision.candidates if each.replica_id == decision.decode_replica)
    rest = max(1, request.num_tokens - found)
    if decision.prefill_remote and decision.prefill_replica is not None:
        return [(decision.decode_replica, 0), (decision.prefill_replica, rest)]
    return [(decision.decode_replica, rest)]
