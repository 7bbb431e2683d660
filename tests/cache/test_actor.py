"""The node store as a Ray actor: the warehouse's contract, its death and return, its folder."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cache.actor import (
    NodeStoreActor,
    NodeStoreOptions,
    RayStorePort,
    connect,
    find_node_store,
    start_node_store,
    stop_node_store,
)
from cache.client import WarehouseClient
from cache.errors import FolderError, FolderInUse, StoreUnavailable
from cache.events import Tier
from cache.extent import Origin
from cache.messages import LoadGrant, PurgeQuery, PurgeReceipt
from cache.tiers.disk import FileTier
from tests.cache.chains import budgets, fill, offer, query, read_and_check, store_config
from tests.contracts.warehouse import TOKENS, WarehouseContract


def options(directory: Path | None) -> NodeStoreOptions:
    return NodeStoreOptions(store_config(budgets(blocks=3)), directory, fsync=False)


@pytest.fixture
def actor(local_ray: str, tmp_path: Path) -> Iterator[Any]:
    handle = start_node_store(local_ray, options(tmp_path / "{node}"))
    yield handle
    stop_node_store(handle)
    wait_until(lambda: find_node_store(local_ray) is None)


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


class TestActor(WarehouseContract):
    @pytest.fixture
    def client(self, local_ray: str, actor: Any) -> WarehouseClient:
        return connect(local_ray, is_local=True)

    def settle(self, client: WarehouseClient) -> None:
        assert isinstance(client.port, RayStorePort)
        assert client.port.stats().state == "ok"


def test_no_verb_waits_behind_those_of_another_kind() -> None:
    """A verb without a group runs in the actor's only other thread, behind whatever waits there."""
    verbs = {name: verb for name, verb in vars(NodeStoreActor).items() if callable(verb) and name[0] != "_"}
    ungrouped = {name for name, verb in verbs.items() if not hasattr(verb, "__ray_concurrency_group__")}
    assert ungrouped == {"wait_ready"}


def test_the_folder_names_the_node(local_ray: str, actor: Any, tmp_path: Path) -> None:
    assert ray.get(actor.stats.remote()).directory == str(tmp_path / local_ray)
    assert start_node_store(local_ray, options(None)) == actor, "a running one is found"
    assert find_node_store(local_ray) == actor


def test_a_purge_reaches_the_store(local_ray: str, actor: Any) -> None:
    client = connect(local_ray, is_local=True)
    assert client.store(offer(TOKENS, origin=Origin("acme", "anna")), fill)
    port = RayStorePort(local_ray)
    assert port.purge(PurgeQuery("acme", "bert")) == PurgeReceipt()
    receipt = port.purge(PurgeQuery("acme", "anna"))
    assert (receipt.num_tokens, receipt.num_left) == (len(TOKENS), 0)
    assert client.lookup(query(TOKENS)).pieces == ()


def test_a_killed_actor_comes_back_with_what_was_on_disk(local_ray: str, actor: Any) -> None:
    client = connect(local_ray, is_local=True)
    assert client.store(offer(TOKENS), fill)
    assert ray.get(actor.flush.remote(30.0))
    port = RayStorePort(local_ray, retry_s=0.1)
    before = port.read_events(None, 0, 0.0)
    assert {event.tier for event in before.events if hasattr(event, "tier")} == {Tier.DRAM, Tier.DISK}
    ray.kill(actor, no_restart=False)

    after = before
    while after.epoch == before.epoch:
        try:
            after = port.read_events(before.epoch, before.next_number, 0.1)
        except StoreUnavailable:
            time.sleep(0.1)
    assert after.is_snapshot
    assert {event.tier for event in after.events if hasattr(event, "tier")} == {Tier.DISK}
    read = read_and_check(WarehouseClient(port), query(TOKENS))
    assert (read.tokens, set(read.tiers)) == (len(TOKENS), {Tier.DISK})


def test_a_client_goes_on_without_a_dead_store_and_finds_it_again(local_ray: str, actor: Any) -> None:
    client = connect(local_ray, is_local=True)
    client.store(offer(TOKENS), fill)
    grant = client.lookup(query(TOKENS))
    assert {piece.tier for piece in grant.pieces} == {Tier.DRAM}
    stop_node_store(actor)
    port = RayStorePort(local_ray, retry_s=0.1)
    with pytest.raises(StoreUnavailable, match=f"node store {local_ray}"):
        port.prepare_load(query(TOKENS))
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="failed a moment ago"):
        RayStorePort.stats(failing_port(local_ray))
    assert time.monotonic() - started < 10.0, "the second call does not wait"
    # Ray frees a dead owner's objects within a second or so.
    wait_until(lambda: list(client.read(query(TOKENS), grant)) == [])
    client.release("reader")


def failing_port(node_id: str) -> RayStorePort:
    port = RayStorePort(node_id, retry_s=60.0)
    with pytest.raises(StoreUnavailable):
        port.stats()
    return port


def test_a_reader_in_another_process_sees_shared_memory(local_ray: str, actor: Any) -> None:
    client = connect(local_ray, is_local=True)
    client.store(offer(TOKENS), fill)
    grant = client.lookup(query(TOKENS))

    @ray.remote(num_cpus=0)
    def read_there(node_id: str, grant: LoadGrant) -> tuple[bytes, bool]:
        blocks = list(connect(node_id, is_local=True).read(query(TOKENS), grant))
        return b"".join(block.payload.tobytes() for block in blocks), blocks[0].payload.flags.owndata

    there, owns_data = ray.get(read_there.remote(local_ray, grant))
    here = b"".join(block.payload.tobytes() for block in client.read(query(TOKENS), grant))
    assert there == here
    assert not owns_data
    client.release("reader")


def test_a_reader_on_another_node_gets_files_through_the_store(local_ray: str, actor: Any) -> None:
    client = connect(local_ray, is_local=False)
    client.store(offer(TOKENS), fill)
    assert ray.get(actor.flush.remote(30.0))
    ray.kill(actor, no_restart=False)
    wait_until(lambda: is_back(local_ray))
    client = connect(local_ray, is_local=False)
    read = read_and_check(client, query(TOKENS))
    assert (read.tokens, set(read.tiers)) == (len(TOKENS), {Tier.DISK})
    with pytest.raises(StoreUnavailable):
        client.fetch(client.port.request_image("not there", Tier.DISK))
    extent_id = client.lookup(query(TOKENS)).pieces[0].extent_id
    assert isinstance(client.fetch(client.port.request_image(extent_id, Tier.DISK)), np.ndarray)


def is_back(node_id: str) -> bool:
    """A killed store has started again from its disk."""
    try:
        return RayStorePort(node_id).stats().num_recovered_blocks > 0
    except StoreUnavailable:
        return False


def test_a_folder_in_use_is_said_at_the_start(local_ray: str, tmp_path: Path) -> None:
    owner = FileTier(tmp_path / "w")
    with pytest.raises(FolderInUse, match="is in use by process"):
        start_node_store(local_ray, replace(options(tmp_path / "w"), lock_wait_s=0.2))
    owner.close()
    wait_until(lambda: find_node_store(local_ray) is None)
    stop_node_store(start_node_store(local_ray, options(tmp_path / "w")))
    wait_until(lambda: find_node_store(local_ray) is None)


def test_a_folder_that_is_a_file_is_said_at_the_start(local_ray: str, tmp_path: Path) -> None:
    (tmp_path / "w").write_text("mine")
    with pytest.raises(FolderError, match="is no folder"):
        start_node_store(local_ray, options(tmp_path / "w"))
    wait_until(lambda: find_node_store(local_ray) is None)
    assert (tmp_path / "w").read_text() == "mine"
