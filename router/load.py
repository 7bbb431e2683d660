"""What this gateway has sent to each replica and not yet got back.

Reports of the engines arrive late and know all gateways; this count is exact and knows one. The policy
takes the larger of both. Not thread-safe: `Router` holds the lock.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Count:
    num_requests: int = 0
    num_tokens: int = 0


class Tracked:
    """One request on its way to one replica."""

    def __init__(self, count: _Count, num_tokens: int) -> None:
        self._count = count
        self._num_tokens = num_tokens
        count.num_requests += 1
        count.num_tokens += num_tokens

    def prefilled(self) -> None:
        """The prompt is computed: its tokens are no longer ahead of others. May be called twice."""
        self._count.num_tokens -= self._num_tokens
        self._num_tokens = 0

    def _close(self) -> None:
        self.prefilled()
        self._count.num_requests -= 1


class InFlight:
    """Requests and uncomputed prompt tokens in flight, per replica."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}

    def __repr__(self) -> str:
        replicas = " ".join(
            f"{name}={each.num_requests}/{each.num_tokens}" for name, each in sorted(self._counts.items())
        )
        return f"<InFlight {replicas or 'nothing'}>"

    def num_requests(self, replica_id: str) -> int:
        count = self._counts.get(replica_id)
        return count.num_requests if count else 0

    def num_tokens(self, replica_id: str) -> int:
        count = self._counts.get(replica_id)
        return count.num_tokens if count else 0

    @contextmanager
    def track(self, replica_id: str, num_tokens: int) -> Iterator[Tracked]:
        """Count one request with `num_tokens` to compute for as long as the block runs, however it ends."""
        count = self._counts.setdefault(replica_id, _Count())
        tracked = Tracked(count, num_tokens)
        try:
            yield tracked
        finally:
            tracked._close()
            if count.num_requests == 0 and self._counts.get(replica_id) is count:
                del self._counts[replica_id]

    def check_integrity(self) -> None:
        """Raise AssertionError for a count that cannot be."""
        for replica_id, count in self._counts.items():
            assert count.num_requests > 0, f"{replica_id} is kept with {count.num_requests} requests"
            assert count.num_tokens >= 0, f"{replica_id} has {count.num_tokens} tokens in flight"
