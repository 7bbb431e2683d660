"""Eviction policies: pure objects that order a tier's extents, the best victim first.

A policy sees ids only. Leases, descendants and superseded tails are the ledger's business: it walks
`victims()` and takes the first ones it may.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol


class EvictionPolicy(Protocol):
    """Order of one tier's extents. `victims` must not be advanced after any other call."""

    def add(self, extent_id: str) -> None:
        """The extent has come into the tier; it counts as used now."""

    def touch(self, extent_id: str) -> None:
        """The extent was used. Unknown ids are ignored."""

    def remove(self, extent_id: str) -> None:
        """The extent has left the tier. Unknown ids are ignored."""

    def victims(self) -> Iterator[str]:
        """All extents, the one to evict first at the front."""


class LruPolicy:
    """Least recently used first.

    The ledger touches a prompt's extents from the last to the first, so an ancestor is always younger
    than its descendants and the oldest extent is a leaf.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<LruPolicy {len(self._order)} extents>"

    def add(self, extent_id: str) -> None:
        self._order[extent_id] = None
        self._order.move_to_end(extent_id)

    def touch(self, extent_id: str) -> None:
        if extent_id in self._order:
            self._order.move_to_end(extent_id)

    def remove(self, extent_id: str) -> None:
        self._order.pop(extent_id, None)

    def victims(self) -> Iterator[str]:
        return iter(self._order)
