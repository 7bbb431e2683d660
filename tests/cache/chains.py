"""Chains with known KV for the tests of the warehouse: a block's bytes follow from its tokens and its history."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cache.client import StorePort, WarehouseClient
from cache.disk_worker import DiskConfig
from cache.extent import NOBODY, ExtentHeader, Image, KVShape, Origin, allocate_image, seal
from cache.fingerprint import Fingerprint
from cache.hashing import BlockHash, TokenIds, as_token_ids, block_hash, chain_hashes
from cache.messages import LoadQuery, StoreOffer
from cache.node_store import NodeStore, NodeStoreConfig
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier

BLOCK_SIZE = 4
SHAPE = KVShape(num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32")
BLOCK_BYTES = BLOCK_SIZE * SHAPE.bytes_per_token
IMAGE_BYTES = 4096 + BLOCK_BYTES
"""Image of an extent of one block."""


def root_of(weights: str = "w", numerics: str = "float32", tenant_salt: str = "") -> BlockHash:
    return Fingerprint(weights, "c", "float32", numerics, BLOCK_SIZE, tenant_salt=tenant_salt).root_hash()


ROOT = root_of()


def budgets(
    dram: int = 1 << 20, disk: int = 1 << 22, handoff: int = 1 << 20, blocks: int = 1, extents: int = 4
) -> Budgets:
    """Budgets in bytes; `blocks` per extent."""
    return Budgets(dram, disk, handoff, extent_max_bytes=blocks * BLOCK_BYTES, max_extents_per_grant=extents)


def store_config(limits: Budgets | None = None, **times: float) -> NodeStoreConfig:
    """A configuration that asks for no free space and waits for nobody, unless told."""
    on_disk = {name: times.pop(name) for name in list(times) if name in DiskConfig.__slots__}
    disk = DiskConfig(**({"min_free_bytes": 0} | on_disk))  # type: ignore[arg-type]
    return NodeStoreConfig(limits or budgets(), disk, **({"store_wait_s": 0.0} | times))  # type: ignore[arg-type]


def query(tokens: Sequence[int], owner: str = "reader", first: int = 0, root: BlockHash = ROOT) -> LoadQuery:
    ids = as_token_ids(tokens)
    return LoadQuery(root, tuple(chain_hashes(root, ids, BLOCK_SIZE)), ids, BLOCK_SIZE, first, owner)


def offer(
    tokens: Sequence[int],
    first: int = 0,
    *,
    root: BlockHash = ROOT,
    with_tail: bool = True,
    handoff_owner: str | None = None,
    is_transient: bool = False,
    origin: Origin = NOBODY,
) -> StoreOffer:
    ids = as_token_ids(tokens)
    hashes = tuple(chain_hashes(root, ids, BLOCK_SIZE))
    return StoreOffer(root, hashes, ids, BLOCK_SIZE, SHAPE, first, with_tail, handoff_owner, is_transient, origin)


def kv_of(parent_hash: BlockHash, token_ids: TokenIds) -> Image:
    """KV of one block, as the real one: token i's bytes follow from the history and the tokens up to i."""
    rows = []
    for end in range(1, len(token_ids) + 1):
        seed = int.from_bytes(block_hash(parent_hash, token_ids[:end])[:8], "little")
        rows.append(np.random.default_rng(seed).integers(0, 256, SHAPE.bytes_per_token, np.uint8))
    return np.concatenate(rows)


def fill(header: ExtentHeader, image: Image) -> None:
    """Put the true KV of all blocks of an extent into its image."""
    parent = header.parent_hash
    for index, h in enumerate(header.block_hashes):
        begin, end = header.block_range(index)
        image[begin:end] = kv_of(parent, header.block_token_ids(index))
        parent = h


def sealed_image(header: ExtentHeader) -> Image:
    image = allocate_image(header)
    fill(header, image)
    seal(header, image)
    return image


def header_of(tokens: Sequence[int], first: int = 0, root: BlockHash = ROOT) -> ExtentHeader:
    """One extent of all full blocks of `tokens` from block `first` on, or of a tail if there are none."""
    ids = as_token_ids(tokens)
    hashes = chain_hashes(root, ids, BLOCK_SIZE)
    parent = hashes[first - 1] if first else root
    if first == len(hashes):
        rest = ids[first * BLOCK_SIZE :]
        return ExtentHeader.make(root, parent, (block_hash(parent, rest),), rest, BLOCK_SIZE, SHAPE, first)
    rest = ids[first * BLOCK_SIZE : len(hashes) * BLOCK_SIZE]
    return ExtentHeader.make(root, parent, hashes[first:], rest, BLOCK_SIZE, SHAPE, first)


@dataclass
class Reading:
    """What a whole lookup-and-read gave."""

    granted_tokens: int
    tokens: int
    """Tokens whose KV arrived and was found right, those before the first block included."""
    tiers: list[str]


def read_and_check(client: WarehouseClient, asked: LoadQuery) -> Reading:
    """Look up, read everything, compare each byte with the true KV, end the lease."""
    grant = client.lookup(asked)
    tokens = asked.first_block * BLOCK_SIZE
    for block in client.read(asked, grant):
        start = block.index * BLOCK_SIZE
        assert start == tokens, "blocks come in order and without gaps"
        parent = asked.block_hashes[block.index - 1] if block.index else asked.root_hash
        true = kv_of(parent, asked.token_ids[start : start + block.num_tokens])
        assert np.array_equal(block.payload[: len(true)], true), "wrong KV"
        tokens += block.num_tokens
    client.release(asked.owner)
    return Reading(grant.num_tokens, tokens if grant.pieces else 0, [piece.tier.value for piece in grant.pieces])


def store_chain(port: StorePort, tokens: Sequence[int]) -> bool:
    return WarehouseClient(port).store(offer(tokens), fill)


def unique_tokens(num_tokens: int) -> Iterator[list[int]]:
    """Chains that share nothing, without end."""
    for chain in range(1, 1 << 20):
        yield [chain * 1000 + i for i in range(num_tokens)]


def crash(store: NodeStore) -> None:
    """End the store as a kill would, except that a write under way ends: nothing is flushed or marked as closed."""
    worker = store._worker
    with store._changed:
        store._ledger.room.dirty.clear()
        worker._removals.clear()
        worker.promotions.clear()
        worker._is_closing = True
        store._changed.notify_all()
    worker._thread.join()
    disk = store._disk
    if isinstance(disk, FileTier):
        disk._db._db.close()
        disk._folder.close()
