"""The thin end in Ray Serve: sends a request to the replica that the gateway chose.

The only module of the package that imports ray. It decides nothing: a target is tried first, the others after
it; without a target, or when the target is gone, it is Serve's usual power of two. The replica that gets the
request plans again on arrival, so a missed target costs time and never an answer.

The target is `ReplicaID.unique_id`, which a replica reads as
`serve.get_replica_context().replica_id.unique_id`.
"""

from random import Random

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class TargetRouter(FIFOMixin, RequestRouter):
    """Obeys `target` of the first positional argument of a call, if it has one.

    Serve's queue is first in, first out, and would hand the replica found for one request to the request that
    has waited longest; here each request gets the replica that was found for it.
    """

    # A busy engine may answer a probe late. Waiting for it is cheaper than losing the blocks that it holds.
    queue_len_response_deadline_s = 1.0

    def initialize_state(self, seed: int | None = None, **unknown: object) -> None:
        """`seed` makes the draws repeatable. Called by Serve with its `request_router_kwargs`."""
        if unknown:
            raise TypeError(f"TargetRouter takes only seed, not {', '.join(sorted(unknown))}")
        self._random = Random(seed)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the first to be tried first. Serve takes the shortest queue of a rank."""
        if pending_request is not None:
            # Without it Serve would ask again in a tight loop while all replicas are full.
            pending_request.routing_context.should_backoff = True
        target = _target(pending_request)
        chosen = [replica for replica in candidate_replicas if replica.replica_id.unique_id == target]
        if chosen:
            return [chosen, [replica for replica in candidate_replicas if replica is not chosen[0]]]
        return [self._random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def _get_pending_request_matching_metadata(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        # By identity: calls that one request makes at the same time share their internal request id.
        for pending_request in self._pending_requests_to_fulfill:
            if pending_request.metadata is request_metadata and not pending_request.future.done():
                return pending_request
        return None


def _target(pending_request: PendingRequest | None) -> str | None:
    if pending_request is None or not pending_request.args:
        return None
    target = getattr(pending_request.args[0], "target", None)
    return target if isinstance(target, str) else None
