"""Least recently used first: the order that the others are held against."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator


class LruPolicy:
    """Least recently used first.

    The ledger touches a prompt's extents from the last to the first, so an ancestor is always younger
    than its descendants and the oldest extent is a leaf.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<LruPolicy {len(self._order)} extents>"

    def add(self, extent_id: str, bytes_per_token: int = 1) -> None:
        self._order[extent_id] = None
        self._order.move_to_end(extent_id)

    def restore(self, extents: Iterable[tuple[str, int]]) -> None:
        self._order.update((extent_id, None) for extent_id, _ in extents)

    def touch(self, extent_id: str) -> None:
        if extent_id in self._order:
            self._order.move_to_end(extent_id)

    def refresh(self, extent_id: str) -> None:
        self.touch(extent_id)

    def remove(self, extent_id: str) -> None:
        self._order.pop(extent_id, None)

    def victims(self) -> Iterator[str]:
        return iter(self._order)
