"""The client believes nothing it has not verified, and leaks nothing when something fails."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cache.client as client_module
from cache.client import WarehouseClient
from cache.errors import ExtentCorrupt, StoreUnavailable
from cache.events import Tier
from cache.extent import ExtentHeader, Image, KVShape, allocate_image, parse_header, seal
from cache.hashing import as_token_ids, chain_hashes
from cache.messages import LoadGrant, LoadQuery, StoreGrant, StoreOffer
from cache.node_store import NodeStore
from cache.read_ahead import verify_block
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import (
    BLOCK_SIZE,
    IMAGE_BYTES,
    ROOT,
    budgets,
    fill,
    header_of,
    kv_of,
    offer,
    query,
    read_and_check,
    root_of,
    sealed_image,
    store_config,
)
from tests.cache.stores import Clock, wait_until

TOKENS = list(range(100, 112))


@pytest.fixture
def store() -> Iterator[NodeStore]:
    with NodeStore(store_config(budgets(blocks=3)), MemoryTier(), None) as opened:
        yield opened
        opened.check_integrity()


def quarantined(store: NodeStore) -> int:
    return store.stats().counters.get("quarantined_extents", 0)


# -- verification -----------------------------------------------------------------------------------


def other_root(_: ExtentHeader) -> ExtentHeader:
    return header_of(TOKENS, root=root_of(weights="others"))


def other_tokens(_: ExtentHeader) -> ExtentHeader:
    return header_of([*TOKENS[:-1], 7])


def other_history(_: ExtentHeader) -> ExtentHeader:
    chain = header_of([1, 2, 3, 4, *TOKENS], first=1)
    return replace(chain, parent_hash=chain.parent_hash)


def other_block_size(_: ExtentHeader) -> ExtentHeader:
    ids = as_token_ids(TOKENS)
    shape = KVShape(2, 1, 4, "float32")
    return ExtentHeader.make(ROOT, ROOT, chain_hashes(ROOT, ids, 6), ids, 6, shape)


def fewer_blocks(_: ExtentHeader) -> ExtentHeader:
    return header_of(TOKENS[:8])


FOREIGN = [
    (other_root, "another fingerprint", 0),
    (other_tokens, "other tokens", 2),
    (other_history, "another history", 0),
    (other_block_size, "other blocks than its index says", 0),
    (fewer_blocks, "other blocks than its index says", 2),
]


@pytest.mark.parametrize(("make", "reason", "num_good"), FOREIGN)
def test_a_foreign_image_in_dram_is_a_miss_and_reported(
    store: NodeStore,
    make: Callable[[ExtentHeader], ExtentHeader],
    reason: str,
    num_good: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A store that hands out the wrong extent: a whole, well-sealed one."""
    header = store.prepare_store(offer(TOKENS)).extents[0]
    store.complete_store(header.extent_id, sealed_image(make(header)))
    assert read_and_check(WarehouseClient(store), query(TOKENS)).tokens == num_good * BLOCK_SIZE
    assert reason in caplog.text
    assert quarantined(store) == 1
    assert WarehouseClient(store).lookup(query(TOKENS)).pieces == ()


@pytest.mark.parametrize(("make", "reason", "num_good"), FOREIGN)
def test_a_foreign_file_is_a_miss_and_reported(
    tmp_path: Path, make: Callable[[ExtentHeader], ExtentHeader], reason: str, num_good: int
) -> None:
    with NodeStore(store_config(budgets(blocks=3)), MemoryTier(), FileTier(tmp_path / "w")) as store:
        WarehouseClient(store).store(offer(TOKENS), fill)
    (path,) = (tmp_path / "w").glob("extents/*/*/*.kv")
    path.write_bytes(sealed_image(make(header_of(TOKENS))).tobytes())
    with NodeStore(store_config(budgets(blocks=3)), MemoryTier(), FileTier(tmp_path / "w")) as store:
        read = read_and_check(WarehouseClient(store), query(TOKENS))
        assert (read.granted_tokens, read.tiers) == (12, [Tier.DISK])
        assert read.tokens in (0, num_good * BLOCK_SIZE), "a file is asked for all its blocks at once"
        assert quarantined(store) == 1
        store.check_integrity()


def test_each_block_is_verified_by_itself(store: NodeStore) -> None:
    header = store.prepare_store(offer(TOKENS)).extents[0]
    image = sealed_image(header)
    image[header.block_range(1)[0]] ^= 1
    store.complete_store(header.extent_id, image)
    assert read_and_check(WarehouseClient(store), query(TOKENS)).tokens == BLOCK_SIZE, "the first one is good"
    assert quarantined(store) == 1


def test_a_block_that_continues_only_in_part_must_match_that_part() -> None:
    header = header_of(TOKENS)
    sealed, image = parse_header(sealed_image(header)), sealed_image(header)
    begin, end = header.block_range(1)
    asked = query([*TOKENS[:6], 7, 7])
    verify_block(sealed, 1, image[begin:end], asked, 1, 2)
    with pytest.raises(ExtentCorrupt, match="other tokens"):
        verify_block(sealed, 1, image[begin:end], asked, 1, 3)


def test_blocks_say_what_they_cover(store: NodeStore) -> None:
    client = WarehouseClient(store)
    client.store(offer(TOKENS), fill)
    asked = query([*TOKENS[:6], 7])
    blocks = list(client.read(asked, client.lookup(asked)))
    assert [(b.index, b.num_tokens, b.stored_tokens, b.tier) for b in blocks] == [
        (0, 4, 4, Tier.DRAM),
        (1, 2, 4, Tier.DRAM),
    ]
    assert np.array_equal(blocks[0].payload, kv_of(ROOT, as_token_ids(TOKENS[:4])))
    assert client.speeds[Tier.DRAM].num_bytes == sum(len(b.payload) for b in blocks)
    assert client.speeds[Tier.DRAM].seconds > 0


@pytest.mark.parametrize("renews", [True, False])
def test_a_slow_load_keeps_what_it_is_still_to_read(monkeypatch: pytest.MonkeyPatch, renews: bool) -> None:
    monkeypatch.setattr(client_module, "RENEW_INTERVAL_S", 0.0 if renews else 1000.0)
    clock = Clock()
    with NodeStore(store_config(budgets()), MemoryTier(), None, clock=clock) as store:
        client = WarehouseClient(store)
        client.store(offer(TOKENS), fill)
        blocks = client.read(query(TOKENS), client.lookup(query(TOKENS)))
        for _ in range(3):
            next(blocks)
            clock.now += 25.0
        with store._changed:
            store._expire()
        assert ("reader" in store._ledger._leases) is renews


# -- storing ----------------------------------------------------------------------------------------


class FillFailed(Exception):
    pass


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_failed_fill_gives_everything_back(fails_at: int) -> None:
    with NodeStore(store_config(budgets()), MemoryTier(), None) as store:
        seen = 0

        def fill_some(header: ExtentHeader, image: Image) -> None:
            nonlocal seen
            if seen == fails_at:
                raise FillFailed
            seen += 1
            fill(header, image)

        with pytest.raises(FillFailed):
            WarehouseClient(store).store(offer(TOKENS), fill_some)
        assert store.stats().num_extents == fails_at
        assert store.stats().dram_bytes == fails_at * IMAGE_BYTES
        store.check_integrity()
        assert WarehouseClient(store).store(offer(TOKENS), fill)
        assert read_and_check(WarehouseClient(store), query(TOKENS)).tokens == 12


def test_a_refusal_is_an_answer(store: NodeStore) -> None:
    store.prepare_store(offer(TOKENS))
    assert not WarehouseClient(store).store(offer(TOKENS), fill)


@pytest.mark.parametrize("with_disk", [False, True])
def test_a_chain_larger_than_the_store_is_no_endless_loop(tmp_path: Path, with_disk: bool) -> None:
    disk = FileTier(tmp_path / "w", fsync=False) if with_disk else None
    limits = budgets(dram=2 * IMAGE_BYTES, disk=2 * IMAGE_BYTES)
    with NodeStore(store_config(limits, store_wait_s=0.2), MemoryTier(), disk) as store:
        assert not WarehouseClient(store).store(offer(list(range(40))), fill)
        assert read_and_check(WarehouseClient(store), query(list(range(40)))).tokens >= 2 * BLOCK_SIZE
        store.check_integrity()


def test_a_store_that_loses_what_it_takes_is_no_endless_loop() -> None:
    with NodeStore(store_config(budgets(extents=1)), MemoryTier(), None) as store:
        filled: list[str] = []

        def fill_and_lose(header: ExtentHeader, image: Image) -> None:
            if filled:
                store.report_bad(filled[-1], Tier.DRAM, "a test says so")
            filled.append(header.extent_id)
            fill(header, image)

        assert not WarehouseClient(store).store(offer(TOKENS), fill_and_lose)
        assert len(filled) == len(set(filled)) == 2, "no extent is made twice"
        store.check_integrity()


class FlakyPort(NodeStore):
    """A node store that is gone when it matters: raises StoreUnavailable from the verbs named."""

    gone: frozenset[str] = frozenset()

    def _check(self, verb: str) -> None:
        if verb in self.gone:
            raise StoreUnavailable(f"{verb}: the store has gone")

    def prepare_load(self, query: LoadQuery) -> LoadGrant:
        self._check("prepare_load")
        return super().prepare_load(query)

    def complete_load(self, owner: str) -> None:
        self._check("complete_load")
        super().complete_load(owner)

    def request_image(self, extent_id: str, tier: Tier) -> Image:
        self._check("request_image")
        return super().request_image(extent_id, tier)

    def report_bad(self, extent_id: str, tier: Tier, reason: str) -> None:
        self._check("report_bad")
        super().report_bad(extent_id, tier, reason)

    def prepare_store(self, offer: StoreOffer) -> StoreGrant:
        self._check("prepare_store")
        return super().prepare_store(offer)

    def complete_store(self, extent_id: str, image: Image) -> bool:
        self._check("complete_store")
        return super().complete_store(extent_id, image)

    def abort_store(self, extent_ids: tuple[str, ...]) -> None:
        self._check("abort_store")
        super().abort_store(extent_ids)


@pytest.fixture
def flaky(tmp_path: Path) -> Iterator[FlakyPort]:
    opened = FlakyPort(store_config(), MemoryTier(), FileTier(tmp_path / "w", fsync=False))
    with opened:
        yield opened
        opened.check_integrity()


def test_a_store_that_dies_during_a_store_is_said_so(flaky: FlakyPort) -> None:
    for gone in ({"prepare_store"}, {"complete_store"}, {"complete_store", "abort_store"}):
        flaky.gone = frozenset(gone)
        with pytest.raises(StoreUnavailable, match=f"{min(gone - {'abort_store'})}: the store has gone"):
            WarehouseClient(flaky).store(offer(TOKENS), fill)
    flaky.gone = frozenset()
    assert flaky.stats().num_extents == 3, "what could not be given back lapses with its time"


def test_a_failed_fill_is_not_hidden_by_a_dead_store(flaky: FlakyPort) -> None:
    flaky.gone = frozenset({"abort_store"})

    def fail(header: ExtentHeader, image: Image) -> None:
        raise FillFailed

    with pytest.raises(FillFailed):
        WarehouseClient(flaky).store(offer(TOKENS), fail)


def test_a_store_that_dies_during_a_read_ends_it(flaky: FlakyPort) -> None:
    client = WarehouseClient(flaky, is_local=False)
    client.store(offer(TOKENS), fill)
    assert flaky.flush()
    for extent_id in [piece.extent_id for piece in client.lookup(query(TOKENS)).pieces[1:]]:
        flaky.report_bad(extent_id, Tier.DRAM, "to make it come from disk")
    grant = client.lookup(query(TOKENS))
    assert [piece.tier for piece in grant.pieces] == [Tier.DRAM, Tier.DISK, Tier.DISK]
    flaky.gone = frozenset({"request_image", "complete_load"})
    assert [block.index for block in client.read(query(TOKENS), grant)] == [0]
    client.release("reader")
    flaky.gone = frozenset({"prepare_load"})
    with pytest.raises(StoreUnavailable):
        client.lookup(query(TOKENS))
    flaky.gone = frozenset()
    client.release("reader")


def test_a_bad_block_of_a_dead_store_ends_the_read_too(flaky: FlakyPort) -> None:
    header = flaky.prepare_store(offer(TOKENS)).extents[0]
    image = allocate_image(header)
    image[:] = 0
    seal(header, image)
    image[-1] ^= 1
    flaky.complete_store(header.extent_id, image)
    grant = flaky.prepare_load(query(TOKENS))
    flaky.gone = frozenset({"report_bad"})
    assert list(WarehouseClient(flaky).read(query(TOKENS), grant)) == []


def test_an_extent_that_has_gone_from_another_node_is_a_miss(flaky: FlakyPort) -> None:
    WarehouseClient(flaky).store(offer(TOKENS[:4]), fill)
    grant = flaky.prepare_load(query(TOKENS[:4]))
    piece = grant.pieces[0]._replace(tier=Tier.DISK, extent_id="gone")
    client = WarehouseClient(flaky, is_local=False)
    assert list(client.read(query(TOKENS[:4]), replace(grant, pieces=(piece,)))) == []


# -- a disk that hangs ------------------------------------------------------------------------------


def test_a_file_that_never_answers_is_a_miss_and_the_disk_is_left_alone_for_a_while(tmp_path: Path) -> None:
    store = NodeStore(store_config(retry_s=0.1), MemoryTier(), FileTier(tmp_path / "w"))
    with store:
        client = WarehouseClient(store, read_timeout_s=0.3)
        client.store(offer(TOKENS), fill)
        assert store.flush()
        for piece in client.lookup(query(TOKENS)).pieces:
            store.report_bad(piece.extent_id, Tier.DRAM, "to make it come from disk")
        client.release("reader")
        grant = client.lookup(query(TOKENS))
        assert {piece.tier for piece in grant.pieces} == {Tier.DISK}
        second = Path(grant.pieces[1].source)
        content = second.read_bytes()
        second.unlink()
        os.mkfifo(second)  # opening it waits until somebody writes
        assert [block.index for block in client.read(query(TOKENS), grant)] == [0]
        assert store.stats().state.startswith("degraded: the disk has not answered for 0.3 s")
        assert list(client.read(query(TOKENS), grant)) == [], "without waiting again"
        os.close(os.open(second, os.O_WRONLY))  # lets the thread that waits go on
        second.unlink()
        second.write_bytes(content)
        wait_until(lambda: store.stats().state == "ok")
        wait_until(lambda: read_and_check(client, query(TOKENS)).tokens == len(TOKENS))
