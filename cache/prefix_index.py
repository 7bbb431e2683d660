"""Which blocks are there, and how far a prompt matches them, also inside a block.

Lookup walks full blocks by hash. At the first miss the stored children of the last block found (full or
partial) are compared by token ids, and the longest common prefix counts: a returning turn recomputes
none of its history, and two sessions that fork inside a block share up to the fork.

Knows hashes and token ids only; the engine's pool and the node store both keep one beside their bytes.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cache.hashing import BlockHash, TokenIds


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Leading full blocks found, then a part of one more block."""

    num_blocks: int
    """Full blocks found, the first ones of the hashes asked for."""
    partial: BlockHash | None
    """A stored block, full or partial, that begins with the tokens that follow."""
    partial_tokens: int
    """How many of its tokens match."""

    def num_tokens(self, block_size: int) -> int:
        return self.num_blocks * block_size + self.partial_tokens


class PrefixIndex:
    """Blocks by hash, and children by parent in the order of their tokens.

    Token ids are kept as big-endian bytes, whose order is the order of the ids: the child with the longest
    common prefix is then a neighbour of the place where the looked-up tokens would be inserted.
    """

    def __init__(self) -> None:
        self._blocks: dict[BlockHash, tuple[BlockHash, bytes]] = {}
        self._children: dict[BlockHash, list[tuple[bytes, BlockHash]]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._blocks

    def __repr__(self) -> str:
        return f"<PrefixIndex {len(self._blocks)} blocks, {len(self._children)} parents>"

    def add(self, block_hash: BlockHash, parent_hash: BlockHash, token_ids: TokenIds) -> None:
        """Enter a block. Entering it twice changes nothing."""
        if block_hash in self._blocks:
            return
        tokens = token_ids.astype(">i4").tobytes()
        self._blocks[block_hash] = (parent_hash, tokens)
        insort(self._children.setdefault(parent_hash, []), (tokens, block_hash))

    def remove(self, block_hash: BlockHash) -> None:
        """Take a block out. Its descendants stay, and are found again when it is stored again."""
        parent_hash, tokens = self._blocks.pop(block_hash)
        children = self._children[parent_hash]
        del children[bisect_left(children, (tokens, block_hash))]
        if not children:
            del self._children[parent_hash]

    def match(
        self, root_hash: BlockHash, block_hashes: Sequence[BlockHash], token_ids: TokenIds, block_size: int
    ) -> PrefixMatch:
        """Longest stored prefix of `token_ids`, whose full blocks have `block_hashes` after `root_hash`."""
        num_blocks = 0
        for block_hash in block_hashes:
            if block_hash not in self._blocks:
                break
            num_blocks += 1
        parent_hash = block_hashes[num_blocks - 1] if num_blocks else root_hash
        rest = token_ids[num_blocks * block_size : (num_blocks + 1) * block_size]
        partial, partial_tokens = self._longest_child(parent_hash, rest)
        return PrefixMatch(num_blocks, partial, partial_tokens)

    def _longest_child(self, parent_hash: BlockHash, token_ids: TokenIds) -> tuple[BlockHash | None, int]:
        children = self._children.get(parent_hash)
        if not children or not len(token_ids):
            return None, 0
        tokens = token_ids.astype(">i4").tobytes()
        at = bisect_left(children, (tokens, b""))
        best: tuple[BlockHash | None, int] = (None, 0)
        for child_tokens, child in children[max(at - 1, 0) : at + 1]:
            num_tokens = common_prefix(tokens, child_tokens)
            if num_tokens > best[1]:
                best = (child, num_tokens)
        return best

    def superseded_by(self, parent_hash: BlockHash, token_ids: TokenIds) -> list[BlockHash]:
        """Partial blocks after `parent_hash` whose tokens are a proper prefix of `token_ids`."""
        children = self._children.get(parent_hash)
        if not children:
            return []
        tokens = token_ids.astype(">i4").tobytes()
        found = []
        # One search per length: a popular parent has far more children than a block has tokens.
        for end in range(4, len(tokens), 4):
            at = bisect_left(children, (tokens[:end], b""))
            if at < len(children) and children[at][0] == tokens[:end]:
                found.append(children[at][1])
        return found

    def check_integrity(self) -> None:
        """Raise AssertionError if the two maps disagree."""
        listed = {child: (parent, tokens) for parent, kids in self._children.items() for tokens, child in kids}
        assert listed == self._blocks, "children and blocks disagree"
        assert all(kids == sorted(kids) for kids in self._children.values()), "children out of order"


def common_prefix(a: bytes, b: bytes) -> int:
    """Number of leading 4-byte token ids that two strings share."""
    length = min(len(a), len(b)) // 4
    same = np.frombuffer(a, ">i4", length) == np.frombuffer(b, ">i4", length)
    return length if same.all() else int(np.argmin(same))
