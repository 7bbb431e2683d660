"""The node store on real memory and real files: durability, stores, leases, clocks, events and threads."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cache.client import WarehouseClient
from cache.events import DeviceBlocks, ExtentRemoved, ExtentStored, ReplicaGone, ReplicaLoad, Tier
from cache.extent import Image
from cache.hashing import pack_hashes
from cache.messages import StoreGrant
from cache.node_store import NodeStore
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import (
    BLOCK_SIZE,
    IMAGE_BYTES,
    budgets,
    crash,
    fill,
    header_of,
    offer,
    query,
    read_and_check,
    sealed_image,
    store_chain,
    store_config,
    unique_tokens,
)
from tests.cache.stores import OTHER, TOKENS, Clock, counter, extent_files, in_thread, open_store, read, wait_until

# -- write-behind and restart -----------------------------------------------------------------------


def test_after_a_flush_everything_is_on_disk(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, TOKENS)
        assert store.flush()
        stats = store.stats()
        assert (stats.dirty_bytes, stats.disk_bytes, stats.dram_bytes) == (0, 8 * IMAGE_BYTES - 128, stats.disk_bytes)
        files = extent_files(tmp_path / "w")
        assert sum(path.stat().st_size for path in files) == stats.disk_bytes
        assert stats.directory == str(tmp_path / "w")


def test_what_was_flushed_survives_a_crash(tmp_path: Path) -> None:
    store = open_store(tmp_path / "w")
    store_chain(store, TOKENS)
    assert store.flush()
    crash(store)
    with open_store(tmp_path / "w") as store:
        assert store.stats().num_recovered_blocks == 8
        assert read(store, TOKENS) == (30, {Tier.DISK})
        store.check_integrity()


def test_closing_flushes_and_may_be_done_twice(tmp_path: Path) -> None:
    store = open_store(tmp_path / "w")
    store_chain(store, TOKENS)
    store.close()
    store.close()
    with open_store(tmp_path / "w") as store:
        assert read(store, TOKENS) == (30, {Tier.DISK})


def test_a_restart_with_a_smaller_disk_budget_deletes_files(tmp_path: Path) -> None:
    with open_store(tmp_path / "w") as store:
        store_chain(store, TOKENS)
    with open_store(tmp_path / "w", store_config(budgets(disk=3 * IMAGE_BYTES))) as store:
        assert store.stats().disk_bytes == 3 * IMAGE_BYTES
        wait_until(lambda: len(extent_files(tmp_path / "w")) == 3)
        assert read(store, TOKENS) == (12, {Tier.DISK})
        store.check_integrity()


def test_a_block_that_lies_in_two_files_is_recovered_once(tmp_path: Path) -> None:
    disk = FileTier(tmp_path / "w")
    for header in (header_of(TOKENS[:8]), header_of(TOKENS[:12], first=1)):
        disk.write(header, sealed_image(header))
        disk.commit()
    disk.close()
    with open_store(tmp_path / "w") as store:
        store.check_integrity()
        wait_until(lambda: len(extent_files(tmp_path / "w")) == 1)
        assert read(store, TOKENS[:12]) == (8, {Tier.DISK})


def test_the_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    config = store_config(budgets(disk=3 * IMAGE_BYTES))
    chains = [[number * 1000 + i for i in range(BLOCK_SIZE)] for number in range(1, 5)]
    with open_store(tmp_path / "w", config) as store:
        for chain in chains[:3]:
            store_chain(store, chain)
            assert store.flush()
        read(store, chains[0])
    with open_store(tmp_path / "w", config) as store:
        store_chain(store, chains[3])
        assert store.flush()
    with open_store(tmp_path / "w", config) as store:
        assert [read(store, chain)[0] for chain in chains] == [4, 0, 4, 4]


# -- stores and leases ------------------------------------------------------------------------------


def test_a_store_without_room_is_refused_with_the_reason() -> None:
    with open_store(None, store_config(budgets(dram=IMAGE_BYTES))) as store:
        store_chain(store, OTHER[:4])
        store.prepare_load(query(OTHER[:4]))
        assert store.prepare_store(offer(TOKENS[:4])) == StoreGrant(refusal="no room")
        assert counter(store, "refused_stores") == 1


def test_what_never_fits_is_refused_at_once() -> None:
    with open_store(None, store_config(budgets(dram=100, handoff=100), store_wait_s=600.0)) as store:
        assert store.prepare_store(offer(OTHER)).refusal == "no room"
        assert store.prepare_store(offer(OTHER, handoff_owner="request")).refusal == "no room"


def test_a_full_handoff_budget_refuses_at_once() -> None:
    with open_store(None, store_config(budgets(handoff=IMAGE_BYTES), store_wait_s=600.0)) as store:
        store.prepare_store(offer(OTHER[:4], handoff_owner="request"))
        assert store.prepare_store(offer(TOKENS[:4], handoff_owner="request")).refusal == "no room"


@pytest.mark.parametrize("ends", ["complete", "abort"])
def test_a_second_writer_waits_for_the_first(ends: str) -> None:
    with open_store(None, store_config(store_wait_s=60.0)) as store:
        header = store.prepare_store(offer(OTHER[:4])).extents[0]
        thread, answers = in_thread(lambda: store.prepare_store(offer(OTHER[:4])))
        thread.join(0.1)
        assert thread.is_alive()
        if ends == "complete":
            assert store.complete_store(header.extent_id, sealed_image(header))
        else:
            store.abort_store((header.extent_id,))
        thread.join(20.0)
        (grant,) = answers
        assert isinstance(grant, StoreGrant)
        assert [h.extent_id for h in grant.extents] == ([] if ends == "complete" else [header.extent_id])
        assert grant.refusal is None


def test_waiting_for_a_busy_writer_ends_in_a_refusal() -> None:
    with open_store(None) as store:
        store.prepare_store(offer(OTHER[:4]))
        assert store.prepare_store(offer(OTHER[:4])).refusal == "another writer is busy with these blocks"


def test_a_store_waits_for_room_that_a_reader_holds() -> None:
    with open_store(None, store_config(budgets(dram=IMAGE_BYTES), store_wait_s=60.0)) as store:
        store_chain(store, OTHER[:4])
        store.prepare_load(query(OTHER[:4], "slow"))
        thread, answers = in_thread(lambda: store_chain(store, TOKENS[:4]))
        thread.join(0.1)
        assert thread.is_alive()
        store.complete_load("slow")
        thread.join(20.0)
        assert answers == [True]


def test_leases_and_reservations_of_the_dead_lapse_by_the_clock() -> None:
    clock = Clock()
    config = store_config(budgets(dram=2 * IMAGE_BYTES), lease_ttl_s=60.0)
    with NodeStore(config, MemoryTier(), None, clock=clock) as store:
        store_chain(store, OTHER[:4])
        store.prepare_load(query(OTHER[:4], "dead reader"))
        grant = store.prepare_store(offer(TOKENS[:4]))
        assert store.prepare_store(offer([1, 2, 3, 4])).refusal == "no room"
        clock.now += 59.0
        store.renew_lease("dead reader")
        clock.now += 59.0
        wait_until(lambda: counter(store, "aborted_extents") == 1)
        assert counter(store, "expired_leases") == 0
        clock.now += 1.0
        wait_until(lambda: counter(store, "expired_leases") == 1)
        assert not store.complete_store(grant.extents[0].extent_id, sealed_image(grant.extents[0]))
        assert store_chain(store, list(range(8)))
        store.check_integrity()


def test_a_lapsed_writer_does_not_spoil_what_another_stored_since() -> None:
    clock = Clock()
    with NodeStore(store_config(), MemoryTier(), None, clock=clock) as store:
        header = store.prepare_store(offer(OTHER[:4])).extents[0]
        clock.now += 61.0
        wait_until(lambda: counter(store, "aborted_extents") == 1)
        assert store_chain(store, OTHER[:4])
        assert store.complete_store(header.extent_id, sealed_image(header)), "it is stored, if by somebody else"
        assert read(store, OTHER[:4]) == (4, {Tier.DRAM})


class FullTier(MemoryTier):
    """Memory that is used up."""

    def put(self, extent_id: str, image: Image) -> None:
        raise MemoryError("no room for it")


def test_a_dram_tier_without_room_refuses_the_extent() -> None:
    with NodeStore(store_config(), FullTier(), None) as store:
        assert not store_chain(store, OTHER)
        assert (store.stats().dram_bytes, store.stats().num_extents) == (0, 0)
        store.check_integrity()


def test_images_of_either_tier_can_be_asked_for_whole(tmp_path: Path) -> None:
    header = header_of(OTHER[:4])
    with open_store(tmp_path / "w") as store:
        store_chain(store, OTHER[:4])
        assert store.flush()
        for tier in (Tier.DRAM, Tier.DISK):
            image = store.read_image(header.extent_id, tier)
            assert image is not None
            assert np.array_equal(image, sealed_image(header))
            assert store.read_image("unknown", tier) is None
    with open_store(None) as store:
        assert store.read_image(header.extent_id, Tier.DISK) is None


# -- events -----------------------------------------------------------------------------------------


def load_of(replica_id: str) -> ReplicaLoad:
    return ReplicaLoad(replica_id, "decode", 1, 2, 3, 4.0, 5.0)


def test_events_tell_what_is_where(tmp_path: Path) -> None:
    header = header_of(OTHER[:4])
    with open_store(tmp_path / "w", store_config(budgets(dram=IMAGE_BYTES), store_wait_s=20.0)) as store:
        start = store.read_events(None, 0)
        store_chain(store, OTHER[:4])
        assert store.flush()
        store_chain(store, TOKENS[:4])
        batch = store.read_events(start.epoch, start.next_number)
        packed = pack_hashes(header.block_hashes)
        assert batch.events[:3] == (
            ExtentStored(header.extent_id, Tier.DRAM, packed),
            ExtentStored(header.extent_id, Tier.DISK, packed),
            ExtentRemoved(header.extent_id, Tier.DRAM),
        )
        assert store.flush()
        snapshot = store.read_events("another epoch", 0)
        assert snapshot.is_snapshot
        assert ExtentStored(header.extent_id, Tier.DISK, packed) in snapshot.events
        assert len(snapshot.events) == 3


def test_engines_report_and_are_forgotten() -> None:
    clock = Clock()
    hashes = header_of(OTHER).block_hashes
    with NodeStore(store_config(replica_ttl_s=30.0), MemoryTier(), None, clock=clock) as store:
        store.report_engine(load_of("a"), DeviceBlocks("a", pack_hashes(hashes), b""))
        store.report_engine(load_of("a"), DeviceBlocks("a", b"", pack_hashes(hashes[1:])))
        store.report_engine(load_of("b"), None)
        snapshot = store.read_events(None, 0)
        assert snapshot.events == (
            load_of("a"),
            DeviceBlocks("a", pack_hashes(hashes[:1]), b""),
            load_of("b"),
            DeviceBlocks("b", b"", b""),
        )
        store.forget_engine("a")
        store.forget_engine("a")
        assert store.read_events(snapshot.epoch, snapshot.next_number).events == (ReplicaGone("a"),)
        clock.now += 31.0
        batch = store.read_events(snapshot.epoch, snapshot.next_number + 1, wait_s=20.0)
        assert batch.events == (ReplicaGone("b"),), "an engine that is silent is gone"


# -- threads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_disk", [False, True])
def test_readers_and_writers_at_once_never_see_a_wrong_byte(tmp_path: Path, with_disk: bool) -> None:
    limits = Budgets(12 * IMAGE_BYTES, 24 * IMAGE_BYTES if with_disk else 0, 4 * IMAGE_BYTES, 600, 2)
    config = store_config(limits, store_wait_s=0.05)
    trunk = list(range(9000, 9010))
    chains = [trunk[: 3 + branch] + [branch * 100 + i for i in range(12)] for branch in range(8)]
    failures: list[BaseException] = []
    num_tokens_read: list[int] = []

    def work(seed: int, store: NodeStore) -> None:
        rng, client = np.random.default_rng(seed), WarehouseClient(store)
        try:
            for _ in range(60):
                tokens = chains[rng.integers(len(chains))][: int(rng.integers(1, 23))]
                if rng.random() < 0.5:
                    owner = f"request {seed}" if rng.random() < 0.3 else None
                    client.store(offer(tokens, handoff_owner=owner), fill)
                num_tokens_read.append(read_and_check(client, query(tokens, f"request {seed}")).tokens)
        except BaseException as failure:
            failures.append(failure)
            raise

    with open_store(tmp_path / "w" if with_disk else None, config) as store:
        threads = [threading.Thread(target=work, args=(seed, store)) for seed in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            store.check_integrity()
            store.read_events(None, 0)
            time.sleep(0.005)
        assert failures == []
        assert sum(num_tokens_read) > 0
        store.flush()
        store.check_integrity()
        assert store.stats().handoff_bytes == 0 or store.stats().dirty_bytes


def test_the_store_shrinks_and_grows_without_end(tmp_path: Path) -> None:
    """Many more chains than fit: budgets hold, old files go, nothing is left behind."""
    limits = Budgets(4 * IMAGE_BYTES, 6 * IMAGE_BYTES, 0, 1024, 4)
    with open_store(tmp_path / "w", store_config(limits, store_wait_s=20.0)) as store:
        for _, tokens in zip(range(40), unique_tokens(6), strict=False):
            assert store_chain(store, tokens)
        assert store.flush()
        store.check_integrity()
        wait_until(lambda: not store._worker._removals)
    files = extent_files(tmp_path / "w")
    assert sum(path.stat().st_size for path in files) <= limits.disk_bytes
    with open_store(tmp_path / "w", store_config(limits)) as store:
        assert store.stats().num_extents == len(files)
