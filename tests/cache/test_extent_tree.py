"""The tree of extents against a plain dict of blocks: what is found, and how extents hang together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.extent import ExtentHeader, slice_header
from cache.extent_tree import Extent, ExtentTree, Run
from cache.hashing import BlockHash, as_token_ids, block_hash, chain_hashes, pack_tokens
from tests.cache.chains import BLOCK_SIZE, ROOT, header_of

Tokens = tuple[int, ...]

# Few different ids, so that chains share a beginning and fork anywhere, also inside a block of four.
CHAINS = st.lists(st.integers(0, 1), min_size=1, max_size=22).map(tuple)
SIZES = st.lists(st.integers(1, 3), min_size=6, max_size=6)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def hashes_of(tokens: Sequence[int]) -> list[BlockHash]:
    return chain_hashes(ROOT, as_token_ids(tokens), BLOCK_SIZE)


@dataclass
class Model:
    """Blocks by hash: their parent's hash, their tokens, and whether they can be read."""

    blocks: dict[BlockHash, tuple[BlockHash, Tokens, bool]] = field(default_factory=dict)

    def add(self, header: ExtentHeader, *, readable: bool = True) -> None:
        parent = header.parent_hash
        for index, each in enumerate(header.block_hashes):
            self.blocks[each] = (parent, tuple(header.block_token_ids(index).tolist()), readable)
            parent = each

    def remove(self, header: ExtentHeader) -> None:
        for each in header.block_hashes:
            del self.blocks[each]

    def covered(self, tokens: Tokens, first: int) -> int:
        """How many tokens a lookup from block `first` on must cover, those before included; 0 for none."""
        hashes = hashes_of(tokens)
        at = first
        while at < len(hashes) and self.blocks.get(hashes[at], (b"", (), False))[2]:
            at += 1
        parent, rest = hashes[at - 1] if at else ROOT, tokens[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]
        nexts = (each for before, each, readable in self.blocks.values() if before == parent and readable)
        partial = max((common(each, rest) for each in nexts), default=0)
        return at * BLOCK_SIZE + partial if at > first or partial else 0


@dataclass
class Forest:
    """A tree beside its model."""

    tree: ExtentTree = field(default_factory=ExtentTree)
    model: Model = field(default_factory=Model)

    def missing(self, tokens: Tokens, sizes: Sequence[int]) -> list[ExtentHeader]:
        """What a store of `tokens` would add, in extents of the given sizes."""
        hashes = hashes_of(tokens)
        headers: list[ExtentHeader] = []
        at = 0
        for size in [*sizes, *[1] * len(hashes)]:
            while at < len(hashes) and hashes[at] in self.model.blocks:
                at += 1
            end = at
            while end < min(at + size, len(hashes)) and hashes[end] not in self.model.blocks:
                end += 1
            if end > at:
                headers.append(header_of(tokens[: end * BLOCK_SIZE], first=at))
            at = end
        if len(tokens) % BLOCK_SIZE:
            tail = header_of(tokens, first=len(hashes))
            headers += [] if tail.block_hash(0) in self.model.blocks else [tail]
        return headers

    def store(self, tokens: Tokens, sizes: Sequence[int] = (), *, readable: bool = True) -> list[Extent]:
        added: list[Extent] = []
        for header in self.missing(tokens, sizes):
            extent = Extent(header, 1, in_dram=readable, is_prepared=not readable)
            self.tree.add(extent, self.holder(header.parent_hash))
            self.model.add(header, readable=readable)
            added.append(extent)
        self.tree.check_integrity()
        return added

    def holder(self, block: BlockHash) -> Extent | None:
        return next((extent for extent in self.tree if block in extent.header.block_hashes), None)

    def remove(self, extent: Extent) -> None:
        self.tree.remove(extent)
        self.model.remove(extent.header)
        self.tree.check_integrity()

    def in_order(self) -> list[Extent]:
        return sorted(self.tree, key=lambda extent: extent.extent_id)

    def check(self, tokens: Tokens, first: int = 0) -> int:
        """Compare a lookup with the model; the tokens covered."""
        found, before = match(self.tree, tokens, first)
        covered = end_of(found) if found else 0
        assert covered == self.model.covered(tokens, first)
        check_runs(found, tokens, first)
        check_runs(before, tokens, None)
        assert all(run.end(BLOCK_SIZE) <= first for run in before)
        return covered


def match(tree: ExtentTree, tokens: Tokens, first: int = 0) -> tuple[list[Run], list[Run]]:
    return tree.match(ROOT, hashes_of(tokens), as_token_ids(tokens), BLOCK_SIZE, first)


def end_of(runs: list[Run]) -> int:
    return runs[-1].first_block * BLOCK_SIZE + runs[-1].num_tokens


def check_runs(runs: list[Run], tokens: Tokens, first: int | None) -> None:
    """Each is readable and holds the tokens that it says; with `first` they start there and have no gaps."""
    at = first
    for run in runs:
        assert run.extent.is_readable
        assert at in (None, run.first_block)
        held = run.extent.header.token_ids[run.index_in_extent * BLOCK_SIZE :][: run.num_tokens].tolist()
        assert held == list(tokens[run.first_block * BLOCK_SIZE :][: run.num_tokens])
        assert run.num_tokens == len(held) > 0
        at = None if first is None else run.end(BLOCK_SIZE)
    assert all(run.num_tokens % BLOCK_SIZE == 0 for run in runs[:-1]), "only the last one ends inside a block"
    assert len({run.extent.extent_id for run in runs}) == len(runs), "an extent is named once"


@given(st.lists(st.tuples(CHAINS, SIZES), max_size=6), CHAINS)
def test_whole_chains_are_found_as_far_as_they_share(stored: list[tuple[Tokens, list[int]]], asked: Tokens) -> None:
    forest = Forest()
    for tokens, sizes in stored:
        forest.store(tokens, sizes)
    for tokens in (asked, *(tokens for tokens, _ in stored)):
        assert forest.check(tokens) == max((common(tokens, each) for each, _ in stored), default=0)


@given(st.data())
def test_every_lookup_agrees_with_a_dict_of_blocks(data: st.DataObject) -> None:
    """Through stores, reservations, losses of any extent and stores of what was lost: behind a gap nothing counts."""
    forest = Forest()
    chains: list[Tokens] = []
    for _ in range(data.draw(st.integers(1, 12))):
        verb = data.draw(st.sampled_from(["store", "extend", "reserve", "remove", "again"]))
        if verb == "remove" and len(forest.tree):
            forest.remove(data.draw(st.sampled_from(forest.in_order())))
        elif verb == "again" and chains:
            forest.store(data.draw(st.sampled_from(chains)), data.draw(SIZES))
        else:
            base = data.draw(st.sampled_from(chains)) if verb == "extend" and chains else ()
            chains.append((base[: data.draw(st.integers(0, len(base)))] + data.draw(CHAINS))[:30])
            forest.store(chains[-1], data.draw(SIZES), readable=verb != "reserve")
        for tokens in (data.draw(CHAINS), *chains):
            forest.check(tokens, data.draw(st.integers(0, len(tokens) // BLOCK_SIZE)))
            check_all_runs(forest, tokens)


def check_all_runs(forest: Forest, tokens: Tokens) -> None:
    """Runs tell where every full block that is known lies, behind gaps too."""
    placed: dict[int, BlockHash] = {}
    for run in forest.tree.runs(hashes_of(tokens)):
        assert run.num_tokens % BLOCK_SIZE == 0
        for index in range(run.num_tokens // BLOCK_SIZE):
            placed[run.first_block + index] = run.extent.header.block_hash(run.index_in_extent + index)
    assert placed == {at: each for at, each in enumerate(hashes_of(tokens)) if each in forest.model.blocks}


@given(st.lists(st.tuples(CHAINS, SIZES), max_size=6), st.integers(0, 6), st.data())
def test_entering_many_at_once_gives_the_same_tree(
    stored: list[tuple[Tokens, list[int]]], num_before: int, data: st.DataObject
) -> None:
    one_by_one = Forest()
    for tokens, sizes in stored:
        one_by_one.store(tokens, sizes)
    extents = [Extent(e.header, 1, in_dram=True) for e in data.draw(st.permutations(one_by_one.in_order()))]
    at_once = ExtentTree()
    assert at_once.add_all(extents[:num_before]) == []
    at_once.check_integrity()
    assert at_once.add_all(extents[num_before:]) == []
    at_once.check_integrity()
    assert shape_of(at_once) == shape_of(one_by_one.tree)


def shape_of(tree: ExtentTree) -> dict[str, tuple[str | None, list[str]]]:
    """Each extent's parent and children, by id."""
    shape: dict[str, tuple[str | None, list[str]]] = {}
    for extent in tree:
        children = sorted(child.extent_id for child in tree.children(extent))
        shape[extent.extent_id] = (extent.parent.extent_id if extent.parent else None, children)
    return shape


def pieces_of(data: st.DataObject) -> list[ExtentHeader]:
    """Pieces of a few chains that may share blocks, as two folders or a crash can leave them behind."""
    chains = [header_of(tokens) for tokens in data.draw(st.lists(CHAINS, min_size=1, max_size=3)) if len(tokens) > 3]
    pieces: dict[str, ExtentHeader] = {}
    for whole in chains:
        for first, size in data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), max_size=5)):
            if first < whole.num_blocks:
                piece = slice_header(whole, first, min(first + size, whole.num_blocks))
                pieces[piece.extent_id] = piece
    return list(pieces.values())


@given(st.data())
def test_of_extents_that_share_blocks_some_are_left_out_and_the_rest_hang_together(data: st.DataObject) -> None:
    pieces = pieces_of(data)
    at = data.draw(st.integers(0, len(pieces)))
    tree = ExtentTree()
    entered: list[Extent] = []
    for part in (pieces[:at], pieces[at:]):
        extents = [Extent(header, 1, in_dram=True) for header in part]
        left_out = tree.add_all(extents)
        assert set(left_out) <= set(extents), "what was there before stays"
        assert len(left_out) == len(set(left_out))
        entered += [extent for extent in extents if extent not in left_out]
        for extent in entered:
            extent.is_prepared = False
        assert set(tree) == set(entered)
        tree.check_integrity()


def test_a_block_in_two_extents_does_not_tear_what_hangs_on_it() -> None:
    """[0 1 2] and [1 2 3] cannot both be in; whichever stays, a branch at 2 hangs on it."""
    chain = header_of(range(16))
    branch = header_of([*range(12), 7, 7, 7, 7], first=3)
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (2, 0, 1)):
        extents = [Extent(h, 1, in_dram=True) for h in (slice_header(chain, 0, 3), slice_header(chain, 1, 4), branch)]
        tree = ExtentTree()
        assert tree.add_all(extents[i] for i in order) == [extents[1]]
        assert extents[2].parent is extents[0]
        tree.check_integrity()


@given(st.lists(st.tuples(CHAINS, SIZES), max_size=6))
def test_tails_within_are_the_proper_prefixes_of_a_block(stored: list[tuple[Tokens, list[int]]]) -> None:
    forest = Forest()
    for tokens, sizes in stored:
        forest.store(tokens, sizes)
    for extent in forest.tree:
        inside = {tail.extent_id for tail in forest.tree.tails_within(extent)}
        assert inside == {tail.extent_id for tail in forest.tree if is_within(tail, extent.header)}
        assert not extent.header.is_tail or forest.tree.is_contained(extent) == any(
            is_within(extent, other.header) for other in forest.tree
        )


def is_within(tail: Extent, header: ExtentHeader) -> bool:
    """By the plain definition: a block after the same parent begins with its tokens and goes on."""
    parent, tokens = header.parent_hash, tail.header.token_ids.tolist()
    for index, each in enumerate(header.block_hashes):
        block = header.block_token_ids(index).tolist()
        if parent == tail.header.parent_hash and block[: len(tokens)] == tokens and len(block) > len(tokens):
            return True
        parent = each
    return False


def test_a_tail_that_no_readable_block_contains_is_not_contained() -> None:
    forest = Forest()
    (tail,) = forest.store((1, 2, 3))
    (full,) = forest.store((1, 2, 3, 4), readable=False)
    assert list(forest.tree.tails_within(full)) == [tail]
    assert not forest.tree.is_contained(tail)
    full.in_dram = True
    assert forest.tree.is_contained(tail)


@pytest.mark.parametrize(("tokens", "holds"), [((5, 6), True), ((5, 6, 7), True), ((5, 7), False), ((6,), False)])
def test_a_tail_is_held_by_any_block_that_begins_with_it(tokens: Tokens, *, holds: bool) -> None:
    forest = Forest()
    forest.store((1, 2, 3, 4, 5, 6, 7, 8), sizes=[2])
    hashes = hashes_of((1, 2, 3, 4))
    runs = forest.tree.runs(hashes)
    held = forest.tree.holds_tail(hashes[0], pack_tokens(as_token_ids(tokens)), runs, 1, BLOCK_SIZE)
    assert held == holds


def test_an_extent_is_found_by_its_first_block_only() -> None:
    forest = Forest()
    (extent,) = forest.store(tuple(range(8)), sizes=[2])
    assert forest.tree.find_first(extent.header.block_hash(0)) is extent
    assert forest.tree.find_first(extent.header.block_hash(1)) is None
    assert forest.tree.find_first(block_hash(ROOT, as_token_ids([9]))) is None
    assert repr(forest.tree) == "<ExtentTree 1 extents>"


@given(st.lists(st.tuples(CHAINS, SIZES), max_size=6), st.data())
def test_taking_out_in_any_order_leaves_nothing(stored: list[tuple[Tokens, list[int]]], data: st.DataObject) -> None:
    forest = Forest()
    for tokens, sizes in stored:
        forest.store(tokens, sizes)
    order: Iterable[Extent] = data.draw(st.permutations(forest.in_order()))
    for extent in order:
        forest.remove(extent)
    assert (len(forest.tree), forest.tree._children) == (0, {})
