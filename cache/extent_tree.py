"""How a node's extents hang together: a tree whose edges are blocks and whose nodes are extents.

    root --[ a b c ]--+--[ d e f ]        one entry per extent, by its first block's hash and by its parent's:
                      +--[ d'g ]          nothing here grows with the number of blocks but the packed hashes
                  +--[ x ]                and token ids of each extent

A walk compares packed hashes, an extent at a time. Where it ends, the blocks that could come next (full or
partial) are compared by token ids, and the longest common prefix counts: a returning turn recomputes none
of its history, and two sessions that fork inside a block share up to the fork.

A block lies in one extent only; whoever adds extents sees to it. Every hash of a chain follows from the
hashes before it, so a walk from the root finds whatever of a prompt is there, behind gaps too.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cache.events import Tier
from cache.extent import ExtentHeader
from cache.hashing import HASH_BYTES, TOKEN_BYTES, BlockHash, TokenIds, common_tokens, pack_hashes, pack_tokens


@dataclass(slots=True, eq=False)
class Extent:
    """One extent's state. `is_handoff`: its dram bytes are charged to the handoff budget."""

    header: ExtentHeader
    image_bytes: int
    parent: "Extent | None" = None
    """The extent that holds the block before its first one, if that is known here."""
    is_prepared: bool = True
    in_dram: bool = False
    on_disk: bool = False
    needs_write: bool = False
    is_writing: bool = False
    is_promoting: bool = False
    is_handoff: bool = False
    is_transient: bool = False
    is_superseded: bool = False
    num_leases: int = 0
    num_disk_hits: int = 0
    expires_at: float = 0.0
    handoff_owner: str | None = None

    @property
    def extent_id(self) -> str:
        return self.header.extent_id

    @property
    def is_readable(self) -> bool:
        return self.in_dram or self.on_disk

    def is_in(self, tier: Tier) -> bool:
        return self.in_dram if tier is Tier.DRAM else self.on_disk

    def takes_room_in(self, tier: Tier) -> bool:
        """It is there, or its bytes are on their way."""
        if tier is Tier.DRAM:
            return self.in_dram or self.is_prepared or self.is_promoting
        return self.on_disk or self.is_writing


class Run(NamedTuple):
    """Consecutive tokens of a prompt that lie together in one extent, the last block maybe in part."""

    extent: Extent
    index_in_extent: int
    """Which block of the extent comes first."""
    first_block: int
    """Position of that block in the prompt, in blocks."""
    num_tokens: int

    def end(self, block_size: int) -> int:
        """Position after its last full block, in blocks."""
        return self.first_block + self.num_tokens // block_size


_run_of = Run._make
"""Half the price of a call of the class, in a lookup that finds hundreds."""


class ExtentTree:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._by_first: dict[BlockHash, Extent] = {}
        self._children: dict[BlockHash, list[Extent]] = {}
        """By the hash of the block that they hang on, in the order of their first tokens."""

    def __len__(self) -> int:
        return len(self._by_first)

    def __iter__(self) -> Iterator[Extent]:
        return iter(self._by_first.values())

    def __repr__(self) -> str:
        return f"<ExtentTree {len(self._by_first)} extents>"

    # -- finding ------------------------------------------------------------------------------------

    def find_first(self, block_hash: BlockHash) -> Extent | None:
        """The extent that begins with a block, prepared or readable."""
        return self._by_first.get(block_hash)

    def runs(self, block_hashes: Sequence[BlockHash], *, readable_from: int | None = None) -> list[Run]:
        """Where the full blocks of a chain, given from its root, lie: prepared extents too, with gaps.

        `readable_from`: readable extents only, and nothing behind the first gap from that block on.
        """
        packed, find = pack_hashes(block_hashes), self._by_first.get
        runs: list[Run] = []
        at = 0
        while at < len(block_hashes):
            extent = find(block_hashes[at])
            if extent is None or (readable_from is not None and not (extent.in_dram or extent.on_disk)):
                if readable_from is not None and at >= readable_from:
                    break
                at += 1
                continue
            header = extent.header
            stored = header.packed_hashes
            if packed.startswith(stored, at * HASH_BYTES):
                num_blocks = len(stored) // HASH_BYTES
            else:
                num_blocks = _shared_blocks(stored, packed, at)
            runs.append(_run_of((extent, 0, at, num_blocks * header.block_size)))
            at += num_blocks
        return runs

    def match(
        self, root_hash: BlockHash, block_hashes: Sequence[BlockHash], token_ids: TokenIds, block_size: int, first: int
    ) -> tuple[list[Run], list[Run]]:
        """The longest readable continuation from block `first` on, and the runs of the blocks before it.

        A run that ends inside a block is the last one. No runs: nothing continues.
        """
        runs = self.runs(block_hashes, readable_from=first)
        before, found = _split(runs, first, block_size) if first else ([], runs)
        at = found[-1].end(block_size) if found else first
        parent_hash = block_hashes[at - 1] if at else root_hash
        rest = pack_tokens(token_ids[at * block_size : (at + 1) * block_size])
        partial = self._longest(parent_hash, rest, [*before[-1:], *found[-1:]], at, block_size)
        if partial is None:
            return found, before
        if found and partial.extent is found[-1].extent:
            return [*found[:-1], found[-1]._replace(num_tokens=found[-1].num_tokens + partial.num_tokens)], before
        return [*found, partial], before

    def _longest(
        self, parent_hash: BlockHash, tokens: bytes, chain: Sequence[Run], at: int, block_size: int
    ) -> Run | None:
        """The block after `parent_hash`, number `at`, that shares most tokens; one of `chain` may end before it."""
        if not tokens:
            return None
        before = next((run for run in chain if run.end(block_size) == at and run.extent.is_readable), None)
        best: Run | None = None
        for extent, index in self._next_blocks(parent_hash, tokens, before, block_size):
            num_tokens = common_tokens(tokens, extent.header.block_tokens(index))
            if num_tokens > (best.num_tokens if best else 0):
                best = Run(extent, index, at, num_tokens)
        return best

    def _next_blocks(
        self, parent_hash: BlockHash, tokens: bytes, before: Run | None, block_size: int
    ) -> Iterator[tuple[Extent, int]]:
        """Readable blocks that may share most tokens: within the extent, and the neighbours among the children."""
        if before is not None:
            index = before.index_in_extent + before.num_tokens // block_size
            if index < before.extent.header.num_blocks:
                yield before.extent, index
        children = self._children.get(parent_hash)
        if not children:
            return
        at = bisect_left(children, tokens, key=_first_tokens)
        yield from _first_readable(children, range(at - 1, -1, -1))
        yield from _first_readable(children, range(at, len(children)))

    def holds_tail(self, parent_hash: BlockHash, tokens: bytes, chain: Sequence[Run], at: int, block_size: int) -> bool:
        """A readable block after `parent_hash` begins with all of `tokens`; `chain` are the runs before it."""
        partial = self._longest(parent_hash, tokens, chain, at, block_size)
        return partial is not None and partial.num_tokens * TOKEN_BYTES == len(tokens)

    # -- changing -----------------------------------------------------------------------------------

    def add(self, extent: Extent, parent: Extent | None) -> None:
        """Enter an extent. `parent` holds the block before its first one, None if that is not here."""
        header = extent.header
        extent.parent = parent
        self._by_first[header.block_hash(0)] = extent
        insort(self._children.setdefault(header.parent_hash, []), extent, key=_first_tokens)
        for child in self.children(extent):
            child.parent = extent

    def add_all(self, extents: Iterable[Extent]) -> list[Extent]:
        """Enter many at once, in any order, readable and not shown yet.

        Returns those that are left out: their blocks lie in another one.
        """
        left_out: list[Extent] = []
        for extent in extents:
            header = extent.header
            if self._by_first.setdefault(header.block_hash(0), extent) is not extent:
                left_out.append(extent)
                continue
            siblings = self._children.get(header.parent_hash)
            if siblings is None:
                self._children[header.parent_hash] = [extent]
            else:
                siblings.append(extent)
        for siblings in self._children.values():
            if len(siblings) > 1:
                siblings.sort(key=_first_tokens)
        # What is taken out may have hidden that its descendants lie in another one too.
        while overlapping := self._link():
            for extent in overlapping:
                self.remove(extent)
            left_out += overlapping
        return left_out

    def _link(self) -> list[Extent]:
        """Find all parents anew. Returns entering extents that must go, as a block lies in two; none: it is in order.

        Most extents hang on the last block of another one, which is found at once. The block that is the first of its
        chain to lie in two extents hangs on an inner one, so of what is wrong something is found each time.
        """
        ends_with = {extent.header.packed_hashes[-HASH_BYTES:]: extent for extent in self}
        on_inner: dict[bytes, list[Extent]] = {}
        for parent_hash, found in self._children.items():
            parent = ends_with.get(parent_hash)
            for child in found:
                child.parent = parent
            if parent is None and parent_hash != found[0].header.root_hash:
                on_inner[parent_hash] = found
        overlapping: dict[Extent, None] = {}
        for extent in self if on_inner else ():
            packed = extent.header.packed_hashes
            for end in range(HASH_BYTES, len(packed), HASH_BYTES):
                inner = packed[end - HASH_BYTES : end]
                if inner not in on_inner:
                    continue
                following = packed[end : end + HASH_BYTES]
                for child in on_inner[inner]:
                    child.parent = extent
                    if child.header.packed_hashes.startswith(following):
                        overlapping[child if _is_entering(child) else extent] = None
        return list(overlapping)

    def remove(self, extent: Extent) -> None:
        """Take an extent out. Its descendants stay, and hang on it again when it is stored again."""
        header = extent.header
        for child in self.children(extent):
            child.parent = None
        siblings = self._children[header.parent_hash]
        del siblings[bisect_left(siblings, _first_tokens(extent), key=_first_tokens)]
        if not siblings:
            del self._children[header.parent_hash]
        del self._by_first[header.block_hash(0)]

    # -- kinship ------------------------------------------------------------------------------------

    def children(self, extent: Extent) -> Iterator[Extent]:
        """The extents that hang on one of its blocks."""
        packed, children = extent.header.packed_hashes, self._children
        for start in range(0, len(packed), HASH_BYTES):
            found = children.get(BlockHash(packed[start : start + HASH_BYTES]))
            if found is not None:
                yield from found

    def tails_within(self, extent: Extent) -> Iterator[Extent]:
        """Partial blocks beside its blocks whose tokens are a proper prefix of theirs."""
        header = extent.header
        parent_hash = header.parent_hash
        for index in range(header.num_blocks):
            siblings = self._children.get(parent_hash)
            if siblings and siblings != [extent]:
                yield from _proper_prefixes(siblings, header.block_tokens(index))
            parent_hash = header.block_hash(index)

    def is_contained(self, tail: Extent) -> bool:
        """Another readable block begins with the tail's tokens."""
        header = tail.header
        tokens = header.packed_tokens
        if tail.parent is not None and tail.parent.is_readable:
            index = tail.parent.header.find_block(header.parent_hash)
            if index is not None and tail.parent.header.block_tokens(index + 1).startswith(tokens):
                return True
        siblings = self._children[header.parent_hash]
        for sibling in siblings[bisect_left(siblings, tokens, key=_first_tokens) :]:
            if not _first_tokens(sibling).startswith(tokens):
                return False
            if sibling is not tail and sibling.is_readable:
                return True
        return False

    def check_integrity(self) -> None:
        """Raise AssertionError if a link is off."""
        hashes = [h for e in self for h in e.header.block_hashes]
        assert len(hashes) == len(set(hashes)), "a block lies in two extents"
        assert all(e.header.block_hash(0) == first for first, e in self._by_first.items()), "a first block is off"
        holders = {h: e for e in self for h in e.header.block_hashes}
        assert all(e.parent is holders.get(e.header.parent_hash) for e in self), "a parent is off"
        for parent_hash, siblings in self._children.items():
            assert siblings, "an empty family is left over"
            assert all(e.header.parent_hash == parent_hash for e in siblings)
            tokens = [_first_tokens(e) for e in siblings]
            assert tokens == sorted(tokens), "children out of order"
        assert {e for siblings in self._children.values() for e in siblings} == set(self), "children and extents differ"


def _split(runs: Iterable[Run], first: int, block_size: int) -> tuple[list[Run], list[Run]]:
    """The runs of full blocks before block `first`, and those from there on."""
    before: list[Run] = []
    found: list[Run] = []
    for run in runs:
        if run.first_block >= first:
            found.append(run)
            continue
        num_before = min(first - run.first_block, run.num_tokens // block_size)
        before.append(Run(run.extent, 0, run.first_block, num_before * block_size))
        left = run.num_tokens - num_before * block_size
        if left:
            found.append(Run(run.extent, num_before, first, left))
    return before, found


def _first_tokens(extent: Extent) -> bytes:
    return extent.header.block_tokens(0)


def _first_readable(children: Sequence[Extent], order: Iterable[int]) -> Iterator[tuple[Extent, int]]:
    """The first block of the first child that can be read, if any: the nearest neighbour on one side."""
    for at in order:
        if children[at].is_readable:
            yield children[at], 0
            return


def _shared_blocks(stored: bytes, asked: bytes, at: int) -> int:
    """How many blocks of an extent go on as the chain does from block `at` on: the first one does, not all do."""
    start = at * HASH_BYTES
    offset = HASH_BYTES
    while asked.startswith(stored[offset : offset + HASH_BYTES], start + offset):
        offset += HASH_BYTES
    return offset // HASH_BYTES


def _is_entering(extent: Extent) -> bool:
    """It comes from a folder, whole, and has not been shown yet."""
    return extent.is_prepared and extent.is_readable


def _proper_prefixes(siblings: list[Extent], tokens: bytes) -> Iterator[Extent]:
    """Partial blocks among the siblings whose tokens are a proper prefix of `tokens`."""
    # One search per length: a popular parent has far more children than a block has tokens.
    for end in range(TOKEN_BYTES, len(tokens), TOKEN_BYTES):
        at = bisect_left(siblings, tokens[:end], key=_first_tokens)
        if at < len(siblings) and _first_tokens(siblings[at]) == tokens[:end]:
            yield siblings[at]
