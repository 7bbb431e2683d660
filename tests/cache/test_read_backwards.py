"""Reading a grant from its end: the same blocks, each verified, and what is behind a bad one counts."""

from pathlib import Path

import numpy as np
import pytest

from cache.client import WarehouseClient
from cache.events import Tier
from cache.extent import ExtentHeader, Image, KVShape
from cache.hashing import as_token_ids, chain_hashes
from cache.messages import LoadQuery, StoreOffer
from cache.node_store import NodeStore
from cache.read_ahead import CHUNK_BYTES
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import BLOCK_BYTES, BLOCK_SIZE, ROOT, budgets, fill, offer, query, store_chain, store_config

TOKENS = list(range(100, 130))
"""Seven full blocks and a tail of two."""

Seen = list[tuple[int, int, int, bytes]]


def read(client: WarehouseClient, asked: LoadQuery, *, backwards: bool = True) -> Seen:
    grant = client.lookup(asked)
    return [
        (block.index, block.num_tokens, block.stored_tokens, block.payload.tobytes())
        for block in client.read(asked, grant, backwards=backwards)
    ]


def move_to_disk(store: NodeStore) -> None:
    assert store.flush()
    for piece in store.prepare_load(query(TOKENS)).pieces:
        store.report_bad(piece.extent_id, Tier.DRAM, "to make it come from disk")
    store.complete_load("reader")


@pytest.mark.parametrize("blocks_per_extent", [1, 3, 10])
@pytest.mark.parametrize("on_disk", [False, True], ids=["dram", "disk"])
def test_the_same_blocks_come_from_the_last_to_the_first(tmp_path: Path, blocks_per_extent: int, on_disk: bool) -> None:
    config = store_config(budgets(blocks=blocks_per_extent, extents=16))
    with NodeStore(config, MemoryTier(), FileTier(tmp_path) if on_disk else None) as store:
        client = WarehouseClient(store)
        assert store_chain(store, TOKENS)
        if on_disk:
            move_to_disk(store)
            assert {piece.tier for piece in client.lookup(query(TOKENS)).pieces} == {Tier.DISK}
        for num_tokens, first in ((30, 0), (28, 0), (29, 0), (18, 2), (30, 7)):
            asked = query(TOKENS[:num_tokens], first=first)
            forwards = read(client, asked, backwards=False)
            assert [index for index, *_ in forwards] == list(range(first, -(-num_tokens // BLOCK_SIZE)))
            assert read(client, asked) == forwards[::-1]
        client.release("reader")


@pytest.mark.parametrize(("bad_block", "expected"), [(6, []), (3, [6, 5, 4]), (0, [6, 5, 4, 3, 2, 1])])
def test_what_is_behind_a_bad_block_counts(tmp_path: Path, bad_block: int, expected: list[int]) -> None:
    with NodeStore(store_config(budgets(blocks=7)), MemoryTier(), FileTier(tmp_path)) as store:
        client = WarehouseClient(store)
        assert client.store(offer(TOKENS[:28]), fill)
        move_to_disk(store)
        grant = client.lookup(query(TOKENS))  # one only: a second would have the file promoted
        (piece,) = grant.pieces
        data = bytearray(Path(piece.source).read_bytes())
        data[len(data) - (7 - bad_block) * BLOCK_BYTES] ^= 1
        Path(piece.source).write_bytes(data)
        assert [block.index for block in client.read(query(TOKENS), grant, backwards=True)] == expected
        assert read(client, query(TOKENS)) == [], "a bad extent is not read twice"
        client.release("reader")


def test_several_chunks_of_one_file(tmp_path: Path) -> None:
    shape, block_size, num_blocks = KVShape(2, 1, 2048, "float32"), 32, 11
    block_bytes = shape.bytes_per_token * block_size
    assert CHUNK_BYTES // block_bytes < num_blocks // 2
    ids = as_token_ids(range(block_size * num_blocks))
    hashes = tuple(chain_hashes(ROOT, ids, block_size))
    rng = np.random.default_rng(0)
    kv = rng.integers(0, 256, (num_blocks, block_bytes), np.uint8)

    def fill_at_random(header: ExtentHeader, image: Image) -> None:
        image[header.payload_offset :] = kv.reshape(-1)

    config = store_config(budgets(1 << 26, 1 << 26, blocks=num_blocks * block_bytes))
    with NodeStore(config, MemoryTier(), FileTier(tmp_path)) as store:
        client = WarehouseClient(store)
        assert client.store(StoreOffer(ROOT, hashes, ids, block_size, shape, 0), fill_at_random)
        assert store.flush()
        asked = LoadQuery(ROOT, hashes, ids, block_size, 0, "reader")
        (piece,) = client.lookup(asked).pieces
        store.report_bad(piece.extent_id, Tier.DRAM, "to make it come from disk")
        seen = read(client, asked)
        assert [index for index, *_ in seen] == list(range(num_blocks - 1, -1, -1))
        assert all(payload == kv[index].tobytes() for index, _, _, payload in seen)
        client.release("reader")
