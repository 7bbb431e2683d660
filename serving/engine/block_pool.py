"""Bookkeeping of the pool's blocks: which are free, which are shared, which can be found again.

A block is in exactly one state:

    free      no content worth anything
    used      ref_count > 0; with a hash it can also be found by others
    cached    ref_count == 0, with a hash: found again until its place is needed (least recently used first)

free + used + cached = num_blocks, always. Never touches the tensor: see `kv_pool` for the bytes.
Blocks of one sequence are laid in consecutive ids where possible, because attention can view a run of blocks
without copying it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cache.extent import Origin
from cache.hashing import BlockHash, TokenIds
from cache.messages import PurgeQuery
from cache.prefix_index import PrefixIndex


class Owner(NamedTuple):
    """Whose KV a block holds, for purges."""

    root_hash: BlockHash
    origin: Origin


@dataclass(frozen=True, slots=True)
class PoolMatch:
    """Blocks that hold the beginning of a prompt."""

    block_ids: tuple[int, ...] = ()
    """Full blocks, to be shared."""
    partial_block_id: int | None = None
    """A block that begins with the next `partial_tokens` tokens, to be copied."""
    partial_tokens: int = 0


@dataclass(slots=True)
class PoolChanges:
    """Hashes that came to and left the pool since the last report."""

    added: set[BlockHash] = field(default_factory=set)
    removed: set[BlockHash] = field(default_factory=set)


class BlockPool:
    """See the module's docstring."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts: npt.NDArray[np.int32] = np.zeros(num_blocks, np.int32)
        self._is_free: npt.NDArray[np.bool_] = np.ones(num_blocks, np.bool_)
        self._num_free = num_blocks
        self.high_water = 0
        """The blocks from here on have never been used."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._index = PrefixIndex()
        self._by_hash: dict[BlockHash, int] = {}
        self._hashes: dict[int, BlockHash] = {}
        self._owners: dict[int, Owner] = {}
        self._changes = PoolChanges()

    def __repr__(self) -> str:
        return (
            f"<BlockPool {self.num_blocks} blocks: {self._num_free} free, "
            f"{self.num_used} used, {len(self._cached)} cached>"
        )

    @property
    def num_available(self) -> int:
        """Blocks that an allocation can have: free ones and cached ones."""
        return self._num_free + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    # -- finding ------------------------------------------------------------------------------------

    def match(self, root_hash: BlockHash, block_hashes: Sequence[BlockHash], token_ids: TokenIds) -> PoolMatch:
        """Longest prefix of `token_ids` in the pool. Valid until the next call that changes the pool."""
        found = self._index.match(root_hash, block_hashes, token_ids, self.block_size)
        block_ids = tuple(self._by_hash[h] for h in block_hashes[: found.num_blocks])
        partial = self._by_hash[found.partial] if found.partial is not None else None
        return PoolMatch(block_ids, partial, found.partial_tokens)

    def register(
        self, block_id: int, block_hash: BlockHash, parent_hash: BlockHash, token_ids: TokenIds, owner: Owner
    ) -> None:
        """Let a used block be found. A second block with the same content stays private to its sequence."""
        if block_hash in self._by_hash or block_id in self._hashes or self._is_covered(parent_hash, token_ids):
            return
        for tail in self._index.superseded_by(parent_hash, token_ids):
            self._forget(self._by_hash[tail])
        self._index.add(block_hash, parent_hash, token_ids)
        self._by_hash[block_hash] = block_id
        self._hashes[block_id] = block_hash
        self._owners[block_id] = owner
        self._note_added(block_hash)

    def _is_covered(self, parent_hash: BlockHash, token_ids: TokenIds) -> bool:
        """A partial block is worth nothing beside one that begins with the same tokens."""
        if len(token_ids) == self.block_size:
            return False
        return self._index.match(parent_hash, (), token_ids, self.block_size).partial_tokens == len(token_ids)

    def purge(self, query: PurgeQuery) -> int:
        """Let nothing be found any more that is meant; returns the number of blocks.

        One that is in use stays with its users, and is free afterwards.
        """
        meant = [block_id for block_id, owner in self._owners.items() if query.means_all_of(*owner)]
        for block_id in meant:
            self._forget(block_id)
        return len(meant)

    def _forget(self, block_id: int) -> None:
        self._unregister(block_id)
        if block_id in self._cached:
            del self._cached[block_id]
            self._set_free(block_id)

    def _unregister(self, block_id: int) -> None:
        del self._owners[block_id]
        block_hash = self._hashes.pop(block_id)
        del self._by_hash[block_hash]
        self._index.remove(block_hash)
        self._note_removed(block_hash)

    # -- taking and giving back ---------------------------------------------------------------------

    def share(self, block_ids: Sequence[int]) -> None:
        """Count one more user of each block, which must be cached or used."""
        for block_id in block_ids:
            self._ref_counts[block_id] += 1
            self._cached.pop(block_id, None)

    def allocate(self, num_blocks: int, after: int | None = None, room: int = 0) -> list[int] | None:
        """Take blocks with one user each; None, and nothing changed, if there are too few.

        `after` is the block that they follow in their sequence, `room` the number of blocks that the sequence
        may want later: both only steer towards consecutive ids.
        """
        if num_blocks > self.num_available:
            return None
        while self._num_free < num_blocks:
            self._evict_oldest()
        taken: list[int] = []
        while len(taken) < num_blocks:
            previous = taken[-1] if taken else after
            taken += self._take_run(num_blocks - len(taken), previous, room)
        return taken

    def _take_run(self, wanted: int, after: int | None, room: int) -> list[int]:
        if after is not None and after + 1 < self.num_blocks and self._is_free[after + 1]:
            start = after + 1
        else:
            start = self._best_run(wanted, wanted + room)
        blocks: list[int] = []
        while len(blocks) < wanted and start < self.num_blocks and self._is_free[start]:
            self._is_free[start] = False
            self._ref_counts[start] = 1
            blocks.append(start)
            start += 1
        self._num_free -= len(blocks)
        self.high_water = max(self.high_water, start)
        return blocks

    def _best_run(self, wanted: int, with_room: int) -> int:
        """Start of the smallest free run with room to grow, else the smallest that fits, else the largest."""
        padded = np.concatenate(([False], self._is_free, [False]))
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        starts, lengths = edges[::2], edges[1::2] - edges[::2]
        for size in (with_room, wanted):
            fitting = np.flatnonzero(lengths >= size)
            if len(fitting):
                return int(starts[fitting[np.argmin(lengths[fitting])]])
        return int(starts[np.argmax(lengths)])

    def release(self, block_ids: Sequence[int]) -> None:
        """Count one user less of each block of a sequence, in the sequence's order."""
        # Last first: a descendant becomes older than its ancestors and is evicted before them.
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id]:
                continue
            if block_id in self._hashes:
                self._cached[block_id] = None
            else:
                self._set_free(block_id)

    def _evict_oldest(self) -> None:
        block_id, _ = self._cached.popitem(last=False)
        self._unregister(block_id)
        self._set_free(block_id)

    def _set_free(self, block_id: int) -> None:
        self._is_free[block_id] = True
        self._num_free += 1

    # -- reporting ----------------------------------------------------------------------------------

    def _note_added(self, block_hash: BlockHash) -> None:
        self._changes.removed.discard(block_hash)
        self._changes.added.add(block_hash)

    def _note_removed(self, block_hash: BlockHash) -> None:
        self._changes.added.discard(block_hash)
        self._changes.removed.add(block_hash)

    @property
    def has_changes(self) -> bool:
        return bool(self._changes.added or self._changes.removed)

    def take_changes(self) -> PoolChanges:
        """What came and left since the last call."""
        changes, self._changes = self._changes, PoolChanges()
        return changes

    def all_hashes(self) -> set[BlockHash]:
        """Everything that can be found now."""
        return set(self._by_hash)

    def check_integrity(self) -> None:
        """Raise AssertionError if blocks are lost, counted twice, or found under a wrong name."""
        self._index.check_integrity()
        used = int((self._ref_counts > 0).sum())
        assert self._num_free == int(self._is_free.sum())
        assert self._num_free + used + len(self._cached) == self.num_blocks, repr(self)
        assert not any(self._is_free[b] or self._ref_counts[b] for b in self._cached)
        assert not self._is_free[self._ref_counts > 0].any()
        assert (self._ref_counts >= 0).all()
        assert {h: b for b, h in self._hashes.items()} == self._by_hash
        assert all(not self._is_free[b] for b in self._hashes)
        assert set(self._cached) <= set(self._hashes)
        assert set(self._owners) == set(self._hashes)
