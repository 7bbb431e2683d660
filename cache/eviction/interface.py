"""What the ledger asks of an eviction policy, and what it tells it.

A policy sees ids only, and what a token takes. Leases, descendants and superseded tails are the ledger's business:
it walks `victims()` and takes the first ones it may.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol


class EvictionPolicy(Protocol):
    """Order of one tier's extents. `victims` must not be advanced after any other call.

    `bytes_per_token` is what an extent saves, turned round: the fewer bytes a token takes, the more time to compute
    it again a byte saves. Later tokens are dearer to compute, yet the position is left out on purpose: it would put
    descendants above the ancestors that have to outlive them.
    """

    def add(self, extent_id: str, bytes_per_token: int = 1) -> None:
        """The extent has come into the tier; it counts as used now."""

    def restore(self, extents: Iterable[tuple[str, int]]) -> None:
        """Extents, each with its `bytes_per_token`, that an earlier life of the tier held, in the order of its victims.

        They come into a tier that was empty, and do not count as used.
        """

    def touch(self, extent_id: str) -> None:
        """The extent was used. Unknown ids are ignored."""

    def refresh(self, extent_id: str) -> None:
        """Something behind the extent has come in: it has to outlive that, but was not used again. Unknown: ignored."""

    def remove(self, extent_id: str) -> None:
        """The extent has left the tier. Unknown ids are ignored."""

    def victims(self) -> Iterator[str]:
        """All extents, the one to evict first at the front. Changes nothing; the first ones come cheap."""
