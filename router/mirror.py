"""What every node holds, as far as this process has heard: the router's in-process index.

It is fed with the node stores' event batches and asked for the holders of a chain of block hashes. It never
calls anybody, keeps nothing on disk, and may be wrong: who loads a block verifies it.

Invariants (`check_integrity`):
    holders[hash] has bit p      <=>  an extent of p's node and tier has the hash, or p's replica said so
    duplicates[hash, p] = n > 0  <=>  n + 1 extents of that node and tier have it
A place (a node's dram, a node's disk, a replica's pool) is one bit of an int, so a block costs one dict entry
whatever the number of its holders. Not thread-safe: `Router` holds the lock.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from cache.events import DeviceBlocks, Event, EventBatch, ExtentRemoved, ExtentStored, ReplicaGone, ReplicaLoad, Tier
from cache.hashing import BlockHash, iter_hashes, pack_hashes
from router.holdings import IN_DISK, IN_DRAM, NOT_HERE, Holdings


class Place(NamedTuple):
    """Where blocks can be. `replica_id` is None for the tiers of the node's store."""

    node_id: str
    tier: Tier
    replica_id: str | None = None


class _Node:
    """What is known of one node beside its blocks' holders."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.next_number = 0
        self.heard_s = 0.0
        self.extents: dict[tuple[str, Tier], bytes] = {}
        """Packed hashes of each extent; the bytes are shared between its tiers."""


class _Prediction(NamedTuple):
    expires_s: float
    place: Place
    block_hashes: bytes


class Mirror:
    """Mirror of all node stores. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float], stale_after_s: float = 10.0, prediction_ttl_s: float = 5.0) -> None:
        self._clock = clock
        self._stale_after_s = stale_after_s
        self._prediction_ttl_s = prediction_ttl_s
        self._nodes: dict[str, _Node] = {}
        self._loads: dict[str, tuple[str, ReplicaLoad]] = {}
        self._holders: dict[BlockHash, int] = {}
        self._duplicates: Counter[tuple[BlockHash, int]] = Counter()
        self._bits: dict[Place, int] = {}
        self._predictions: deque[_Prediction] = deque()
        self._predicted: dict[BlockHash, Counter[Place]] = {}

    def __repr__(self) -> str:
        return (
            f"<Mirror nodes={len(self._nodes)} replicas={len(self._loads)} blocks={len(self._holders)} "
            f"predictions={len(self._predictions)}>"
        )

    # -- feeding

    def position(self, node_id: str) -> tuple[str | None, int]:
        """`(epoch, number)` to read this node's events from; `(None, 0)` asks for a snapshot."""
        node = self._nodes.get(node_id)
        return (node.epoch, node.next_number) if node else (None, 0)

    def apply(self, batch: EventBatch) -> bool:
        """Take in a node's news. False: events are missing in between, and `position` now asks for a snapshot."""
        if batch.is_snapshot:
            self.forget_node(batch.node_id)
        node = self._nodes.setdefault(batch.node_id, _Node())
        first_number = batch.next_number - len(batch.events)
        if not batch.is_snapshot and (node.epoch != batch.epoch or first_number > node.next_number):
            self.forget_node(batch.node_id)
            return False
        num_known = 0 if batch.is_snapshot else max(0, node.next_number - first_number)
        for event in batch.events[num_known:]:
            self._apply_event(batch.node_id, node, event)
        node.epoch = batch.epoch
        node.next_number = batch.next_number if batch.is_snapshot else max(node.next_number, batch.next_number)
        node.heard_s = self._clock()
        return True

    def forget_node(self, node_id: str) -> None:
        """The node has died or starts over: forget its blocks, its replicas and its position."""
        self._nodes.pop(node_id, None)
        self._loads = {replica: at for replica, at in self._loads.items() if at[0] != node_id}
        self._drop_places([place for place in self._bits if place.node_id == node_id])

    def forget_replica(self, replica_id: str) -> None:
        """The replica has gone: forget its load and its pool."""
        self._loads.pop(replica_id, None)
        self._drop_places([place for place in self._bits if place.replica_id == replica_id])

    def predict(self, replica_id: str, block_hashes: Sequence[BlockHash]) -> None:
        """Blocks that a request just routed will create in this replica's pool, believed for a few seconds."""
        self._expire_predictions()
        if replica_id not in self._loads:
            return
        place = Place(self._loads[replica_id][0], Tier.DEVICE, replica_id)
        bit = self._bit(place)
        coming = [block_hash for block_hash in block_hashes if not self._holders.get(block_hash, 0) & bit]
        for block_hash in coming:
            self._predicted.setdefault(block_hash, Counter())[place] += 1
        expires_s = self._clock() + self._prediction_ttl_s
        self._predictions.append(_Prediction(expires_s, place, pack_hashes(coming)))

    # -- asking

    @property
    def loads(self) -> dict[str, tuple[str, ReplicaLoad]]:
        """Node and last report of each known replica."""
        return dict(self._loads)

    def is_stale(self, node_id: str) -> bool:
        """True: nothing heard from the node for `stale_after_s`, not even an empty batch."""
        node = self._nodes.get(node_id)
        return node is None or self._clock() - node.heard_s > self._stale_after_s

    def longest_prefix(self, block_hashes: Sequence[BlockHash]) -> Holdings:
        """Holders of the leading blocks, up to the first that nobody has. Stale nodes do not count."""
        self._expire_predictions()
        fresh = {place: bit for place, bit in self._bits.items() if not self.is_stale(place.node_id)}
        known = sum(fresh.values())
        masks: list[int] = []
        for block_hash in block_hashes:
            mask = (self._holders.get(block_hash, 0) | self._predicted_mask(block_hash)) & known
            if not mask:
                break
            masks.append(mask)
        if not masks:
            return Holdings()
        return Holdings(_leading_device_blocks(masks, fresh), _node_codes(masks, fresh))

    # -- inside

    def _apply_event(self, node_id: str, node: _Node, event: Event) -> None:
        match event:
            case ExtentStored(extent_id, tier, block_hashes):
                self._remove_extent(node_id, node, extent_id, tier)
                other = node.extents.get((extent_id, Tier.DISK if tier is Tier.DRAM else Tier.DRAM))
                node.extents[extent_id, tier] = other if other == block_hashes else block_hashes
                self._add(Place(node_id, tier), iter_hashes(block_hashes), count=True)
            case ExtentRemoved(extent_id, tier):
                self._remove_extent(node_id, node, extent_id, tier)
            case DeviceBlocks(replica_id, added, removed):
                place = Place(node_id, Tier.DEVICE, replica_id)
                self._remove(place, iter_hashes(removed))
                self._add(place, iter_hashes(added), count=False)
            case ReplicaLoad(replica_id):
                self._loads[replica_id] = (node_id, event)
            case ReplicaGone(replica_id):
                self.forget_replica(replica_id)

    def _remove_extent(self, node_id: str, node: _Node, extent_id: str, tier: Tier) -> None:
        block_hashes = node.extents.pop((extent_id, tier), None)
        if block_hashes is not None:
            self._remove(Place(node_id, tier), iter_hashes(block_hashes))

    def _add(self, place: Place, block_hashes: Iterable[BlockHash], count: bool) -> None:
        """`count`: a block may be there more than once (in two extents); a pool has it or has it not."""
        bit = self._bit(place)
        for block_hash in block_hashes:
            mask = self._holders.get(block_hash, 0)
            if not mask & bit:
                self._holders[block_hash] = mask | bit
            elif count:
                self._duplicates[block_hash, bit] += 1

    def _remove(self, place: Place, block_hashes: Iterable[BlockHash]) -> None:
        bit = self._bit(place)
        for block_hash in block_hashes:
            if (block_hash, bit) in self._duplicates:
                self._duplicates[block_hash, bit] -= 1
                if not self._duplicates[block_hash, bit]:
                    del self._duplicates[block_hash, bit]
                continue
            mask = self._holders.get(block_hash, 0) & ~bit
            if mask:
                self._holders[block_hash] = mask
            else:
                self._holders.pop(block_hash, None)

    def _bit(self, place: Place) -> int:
        bit = self._bits.get(place)
        if bit is None:
            # The lowest free bit: ints below 257 are shared by the whole process and cost nothing.
            taken = sum(self._bits.values())
            bit = self._bits[place] = ~taken & (taken + 1)
        return bit

    def _drop_places(self, places: list[Place]) -> None:
        if not places:
            return
        # Predictions go first: a bit that is free may be given to another place.
        for prediction in [each for each in self._predictions if each.place in places]:
            self._predictions.remove(prediction)
            self._unpredict(prediction)
        bits = sum(self._bits.pop(place) for place in places)
        self._holders = {each: rest for each, mask in self._holders.items() if (rest := mask & ~bits)}
        for key in [key for key in self._duplicates if key[1] & bits]:
            del self._duplicates[key]

    def _predicted_mask(self, block_hash: BlockHash) -> int:
        places = self._predicted.get(block_hash)
        return sum(self._bits[place] for place in places) if places else 0

    def _expire_predictions(self) -> None:
        now_s = self._clock()
        while self._predictions and self._predictions[0].expires_s <= now_s:
            self._unpredict(self._predictions.popleft())

    def _unpredict(self, prediction: _Prediction) -> None:
        for block_hash in iter_hashes(prediction.block_hashes):
            places = self._predicted[block_hash]
            places[prediction.place] -= 1
            if not places[prediction.place]:
                del places[prediction.place]
            if not places:
                del self._predicted[block_hash]

    def check_integrity(self) -> None:
        """Raise AssertionError if the index disagrees with the extents and predictions that it was made from."""
        stored: Counter[tuple[BlockHash, int]] = Counter()
        for node_id, node in self._nodes.items():
            for (_, tier), block_hashes in node.extents.items():
                bit = self._bits[Place(node_id, tier)]
                stored.update((block_hash, bit) for block_hash in iter_hashes(block_hashes))
        store_bits = sum(bit for place, bit in self._bits.items() if place.replica_id is None)
        held: Counter[tuple[BlockHash, int]] = Counter(self._duplicates)
        for block_hash, mask in self._holders.items():
            assert mask and not mask & ~sum(self._bits.values()), f"{block_hash.hex()} has an unknown holder: {mask:b}"
            held.update((block_hash, 1 << i) for i in range(mask.bit_length()) if mask & store_bits & 1 << i)
        assert held == stored, f"holders differ from extents: {held - stored} too many, {stored - held} missing"
        predicted: Counter[tuple[BlockHash, Place]] = Counter()
        for each in self._predictions:
            predicted.update((block_hash, each.place) for block_hash in iter_hashes(each.block_hashes))
        counted = {(name, place): n for name, places in self._predicted.items() for place, n in places.items()}
        assert counted == predicted, "predicted blocks differ from the predictions"


def _leading_device_blocks(masks: list[int], places: dict[Place, int]) -> dict[str, int]:
    leading: dict[str, int] = {}
    for place, bit in places.items():
        if place.replica_id is not None and masks[0] & bit:
            leading[place.replica_id] = next((i for i, mask in enumerate(masks) if not mask & bit), len(masks))
    return leading


def _node_codes(masks: list[int], places: dict[Place, int]) -> dict[str, bytes]:
    """Fastest tier of each node's store for each block. There are far fewer different masks than blocks."""
    different = set(masks)
    codes: dict[str, bytes] = {}
    for node_id in {place.node_id for place in places if place.replica_id is None}:
        dram = places.get(Place(node_id, Tier.DRAM), 0)
        disk = places.get(Place(node_id, Tier.DISK), 0)
        code = {mask: IN_DRAM if mask & dram else IN_DISK if mask & disk else NOT_HERE for mask in different}
        if any(code.values()):
            codes[node_id] = bytes(map(code.__getitem__, masks))
    return codes
