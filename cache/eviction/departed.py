"""A compact memory of the extents that have left a tier, and how often each had been used.

It keeps a few times as many as the tier holds. Those that left at the same time are forgotten at the same time, and
descendants leave before their ancestors: an ancestor is hardly ever forgotten while a descendant is remembered.
"""

import zlib
from array import array
from collections.abc import Iterator

PLACES_PER_EXTENT = 7
"""For each extent that the tier holds, at least; at most a quarter more."""
MOST_HITS = 7
_WAYS = 8
_FEWEST_GROUPS = 128
_GENERATIONS = 32
_PER_TABLE = 8
"""Generations in which as many leave as the table has places: an entry is gone long before its number comes again."""
_KEPT = 5
"""Generations that are remembered. So few leave room: hardly ever is one overwritten before its time."""


def digest_of(extent_id: str) -> int:
    """32 bits that are the same in every process."""
    return zlib.crc32(extent_id.encode())


class Departed:
    """A hash table of five bytes a place. In goes the one that leaves, out the oldest beside it.

    place:  | digest, 32 bits | hits, 3 bits | generation, 5 bits |      digest 0: empty

    An entry lies in one of two groups of places, which follow from its digest.
    """

    def __init__(self) -> None:
        self._generation = 0
        self._until_next = 0
        self._make_table(_FEWEST_GROUPS)

    def __repr__(self) -> str:
        num_entries = len(self._digests) - self._digests.count(0)
        return f"<Departed {num_entries} in {len(self._digests)} places>"

    def _make_table(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._digests = array("I", bytes(4 * num_groups * _WAYS))
        self._notes = bytearray(num_groups * _WAYS)

    def remember(self, digest: int, num_hits: int) -> None:
        """It leaves now, having been used again `num_hits` times; seven or more are the same."""
        if self._until_next == 0:
            self._generation = (self._generation + 1) % _GENERATIONS
            self._until_next = len(self._digests) // _PER_TABLE
        self._until_next -= 1
        place = max(self._places(digest), key=self._age)
        self._digests[place] = digest
        self._notes[place] = min(num_hits, MOST_HITS) * _GENERATIONS + self._generation

    def recall(self, digest: int) -> int | None:
        """It comes back: how often it had been used, None if that is not remembered. Forgets it."""
        for begin in self._groups(digest) if digest else ():
            digests = self._digests[begin : begin + _WAYS]
            if digest in digests:
                place = begin + digests.index(digest)
                is_kept = self._age(place) < _KEPT
                self._digests[place] = 0
                return self._notes[place] // _GENERATIONS if is_kept else None
        return None

    def grow_for(self, num_extents: int) -> None:
        """Keep the memory in proportion to the tier. Starts anew: hardly any extents leave a tier that grows."""
        if len(self._digests) < PLACES_PER_EXTENT * num_extents:
            self._make_table(PLACES_PER_EXTENT * num_extents * 5 // 4 // _WAYS)

    def _groups(self, digest: int) -> tuple[int, int]:
        """Where its two groups begin."""
        return digest % self._num_groups * _WAYS, (digest * 0x9E3779B1 >> 16) % self._num_groups * _WAYS

    def _places(self, digest: int) -> Iterator[int]:
        for begin in self._groups(digest):
            yield from range(begin, begin + _WAYS)

    def _age(self, place: int) -> int:
        """In generations; an empty place is older than all others."""
        if not self._digests[place]:
            return _GENERATIONS
        return (self._generation - self._notes[place]) % _GENERATIONS
