"""A reader on one Ray node whose blocks lie on another: two raylets on this machine, each with its own object store."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.node import Node
from ray._private.parameter import RayParams

from cache.actor import NodeStoreOptions, connect, start_node_store
from cache.client import NUM_IN_FLIGHT, WarehouseClient
from cache.disk_worker import DiskConfig
from cache.events import Tier
from cache.extent import ExtentHeader, Image, KVShape
from cache.hashing import as_token_ids, chain_hashes
from cache.messages import LoadQuery, StoreOffer
from cache.node_store import NodeStoreConfig
from cache.occupancy import Budgets
from tests.cache.chains import ROOT

BLOCK_SIZE = 32
SHAPE = KVShape(4, 2, 32, "float32")
EXTENT_BYTES = BLOCK_SIZE * SHAPE.bytes_per_token
NUM_BLOCKS = 24
IDS = as_token_ids(range(NUM_BLOCKS * BLOCK_SIZE))
HASHES = tuple(chain_hashes(ROOT, IDS, BLOCK_SIZE))
QUERY = LoadQuery(ROOT, HASHES, IDS, BLOCK_SIZE, 0, "reader")


@contextmanager
def second_node() -> Iterator[tuple[str, Node]]:
    """One more raylet of the session that this process is connected to; its id, and the way to kill it."""
    params = RayParams(
        gcs_address=ray.get_runtime_context().gcs_address,
        num_cpus=1,
        object_store_memory=100 << 20,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        include_log_monitor=False,  # type: ignore[arg-type]
    )
    node = Node(params, head=False, shutdown_at_exit=True, spawn_reaper=True)
    try:
        wait_until(lambda: node.node_id in alive_nodes())
        yield str(node.node_id), node
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def alive_nodes() -> set[str]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {each["NodeID"] for each in nodes if each["Alive"]}


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def fill(header: ExtentHeader, image: Image) -> None:
    image[header.payload_offset :] = header.first_block + 1


def store_there(node_id: str, directory: Path) -> Any:
    """A node store on the other node, with the whole chain in its dram and on its disk."""
    budgets = Budgets(64 << 20, 64 << 20, 0, EXTENT_BYTES)
    options = NodeStoreOptions(NodeStoreConfig(budgets, DiskConfig(min_free_bytes=0)), directory, fsync=False)
    handle = start_node_store(node_id, options)
    client = connect(node_id, is_local=False)
    assert client.store(StoreOffer(ROOT, HASHES, IDS, BLOCK_SIZE, SHAPE, 0), fill)
    assert ray.get(handle.flush.remote(30.0))
    return handle


def read(client: WarehouseClient) -> Iterator[int]:
    """Positions of the blocks that come, each checked."""
    for block in client.read(QUERY, client.lookup(QUERY)):
        assert np.all(block.payload == block.index + 1), "wrong KV"
        yield block.index


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.DISK])
def test_blocks_of_another_node_come_through_its_store(local_ray: str, tmp_path: Path, tier: Tier) -> None:
    with second_node() as (node_id, _):
        handle = store_there(node_id, tmp_path / "w")
        client = connect(node_id, is_local=False)
        if tier is Tier.DISK:
            for piece in client.lookup(QUERY).pieces:
                ray.get(handle.report_bad.remote(piece.extent_id, Tier.DRAM, "to make it come from disk"))
            client.release("reader")
        assert {piece.tier for piece in client.lookup(QUERY).pieces} == {tier}
        assert list(read(client)) == list(range(NUM_BLOCKS))
        assert client.speeds == {}, "another node's bandwidth says nothing of this one's tiers"


def test_the_owners_death_in_the_middle_is_a_miss_for_the_rest(local_ray: str, tmp_path: Path) -> None:
    with second_node() as (node_id, node):
        handle = store_there(node_id, tmp_path / "w")
        client = connect(node_id, is_local=False)
        came: list[int] = []
        for index in read(client):
            came.append(index)
            if index == 1:
                node.kill_all_processes(check_alive=False, allow_graceful=False)
                time.sleep(1.0)  # whatever was on its way has arrived
        assert came == list(range(len(came)))
        assert 2 <= len(came) <= 2 + 2 * NUM_IN_FLIGHT, "some were on their way, the rest is gone"
        del handle  # an actor without references would have ended by itself
