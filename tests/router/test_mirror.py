"""The mirror against a naive model, and its resuming, forgetting, ageing and predicting."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.events import (
    DeviceBlocks,
    Event,
    EventBatch,
    EventLog,
    ExtentRemoved,
    ExtentStored,
    ReplicaGone,
    ReplicaLoad,
    Tier,
)
from cache.hashing import BlockHash, iter_hashes, pack_hashes
from router.holdings import IN_DISK, IN_DRAM, NOT_HERE
from router.mirror import Mirror


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


CHAIN = tuple(block(number) for number in range(6))


def packed(numbers: Sequence[int]) -> bytes:
    return pack_hashes([block(number) for number in numbers])


def load(replica_id: str) -> ReplicaLoad:
    return ReplicaLoad(replica_id, "decode", 0, 0, 0, 0.0, 0.0)


def snapshot(node_id: str, *events: Event, epoch: str = "e", next_number: int = 0) -> EventBatch:
    return EventBatch(node_id, epoch, next_number, True, events)


class Model:
    """One node as plain dicts of sets; the log's snapshot is made from it."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.extents: dict[tuple[str, Tier], bytes] = {}
        self.devices: dict[str, set[BlockHash]] = {}
        self.replicas: set[str] = set()
        self.log = EventLog(node_id, "e", self.snapshot, capacity=4)

    def snapshot(self) -> list[Event]:
        events: list[Event] = [ExtentStored(name, tier, hashes) for (name, tier), hashes in self.extents.items()]
        events += [DeviceBlocks(name, pack_hashes(sorted(held)), b"") for name, held in self.devices.items()]
        return events + [load(name) for name in sorted(self.replicas)]

    def happen(self, event: Event) -> None:
        match event:
            case ExtentStored(name, tier, hashes):
                self.extents[name, tier] = hashes
            case ExtentRemoved(name, tier):
                self.extents.pop((name, tier), None)
            case DeviceBlocks(name, added, removed):
                held = self.devices.setdefault(name, set())
                held.difference_update(iter_hashes(removed))
                held.update(iter_hashes(added))
            case ReplicaLoad(name):
                self.replicas.add(name)
            case ReplicaGone(name):
                self.replicas.discard(name)
                self.devices.pop(name, None)
        self.log.append(event)

    def code(self, block_hash: BlockHash) -> int:
        for tier, code in ((Tier.DRAM, IN_DRAM), (Tier.DISK, IN_DISK)):
            if any(block_hash in set(iter_hashes(hashes)) for (_, at), hashes in self.extents.items() if at is tier):
                return code
        return NOT_HERE


def expected_prefix(models: Sequence[Model], chain: Sequence[BlockHash]) -> tuple[dict[str, int], dict[str, bytes]]:
    length = 0
    for block_hash in chain:
        if not any(m.code(block_hash) or any(block_hash in held for held in m.devices.values()) for m in models):
            break
        length += 1
    devices: dict[str, int] = {}
    for held_by in (m.devices for m in models):
        for replica_id, held in held_by.items():
            leading = next((i for i in range(length) if chain[i] not in held), length)
            if leading:
                devices[replica_id] = leading
    nodes = {m.node_id: bytes(m.code(block_hash) for block_hash in chain[:length]) for m in models}
    return devices, {node_id: codes for node_id, codes in nodes.items() if any(codes)}


tiers = st.sampled_from([Tier.DRAM, Tier.DISK])
numbers = st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True)
# The blocks of an extent follow from its name; two extents may share a block.
contents = {"x": packed([0, 1]), "y": packed([2, 3, 4]), "z": packed([1, 2]), "tail": packed([5])}
names = st.sampled_from(sorted(contents))


def events_of(node_id: str) -> st.SearchStrategy[Event]:
    replicas = st.sampled_from([f"{node_id}-r1", f"{node_id}-r2"])
    return st.one_of(
        st.builds(lambda name, tier: ExtentStored(name, tier, contents[name]), names, tiers),
        st.builds(ExtentRemoved, names, tiers),
        st.builds(lambda r, a, b: DeviceBlocks(r, packed(a), packed(b)), replicas, numbers, numbers),
        st.builds(load, replicas),
        st.builds(ReplicaGone, replicas),
    )


steps = st.lists(
    st.one_of(
        st.tuples(st.just(0), events_of("n0")),
        st.tuples(st.just(1), events_of("n1")),
        st.tuples(st.sampled_from([0, 1]), st.none()),  # read this node's news
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_mirror_agrees_with_a_naive_model(steps: list[tuple[int, Event | None]]) -> None:
    models = [Model("n0"), Model("n1")]
    mirror = Mirror(Clock())

    def catch_up(model: Model) -> None:
        assert mirror.apply(model.log.read(*mirror.position(model.node_id)))
        mirror.check_integrity()

    for which, event in steps:
        if event is None:
            catch_up(models[which])
        else:
            models[which].happen(event)
    for model in models:
        catch_up(model)
    devices, nodes = expected_prefix(models, CHAIN)
    found = mirror.longest_prefix(CHAIN)
    assert (dict(found.devices), dict(found.nodes)) == (devices, nodes)
    assert set(mirror.loads) == models[0].replicas | models[1].replicas


def test_events_that_repeat_a_snapshot_are_harmless() -> None:
    mirror = Mirror(Clock())
    stored = ExtentStored("x", Tier.DRAM, contents["x"])
    mirror.apply(snapshot("n", stored))
    assert mirror.apply(EventBatch("n", "e", 2, False, (stored, stored)))
    mirror.apply(EventBatch("n", "e", 3, False, (ExtentRemoved("x", Tier.DRAM),)))
    mirror.check_integrity()
    assert mirror.longest_prefix(CHAIN).nodes == {}


def test_a_batch_that_overlaps_the_last_one_is_applied_once() -> None:
    mirror = Mirror(Clock())
    mirror.apply(snapshot("n"))
    stored, removed = ExtentStored("x", Tier.DRAM, contents["x"]), ExtentRemoved("x", Tier.DRAM)
    mirror.apply(EventBatch("n", "e", 2, False, (stored, removed)))
    assert mirror.apply(EventBatch("n", "e", 1, False, (stored,)))
    assert mirror.longest_prefix(CHAIN).nodes == {}
    assert mirror.position("n") == ("e", 2)


@pytest.mark.parametrize(
    "later", [EventBatch("n", "e", 9, False, (load("r"),)), EventBatch("n", "other", 1, False, (load("r"),))]
)
def test_a_gap_or_a_new_epoch_asks_for_a_snapshot(later: EventBatch) -> None:
    mirror = Mirror(Clock())
    mirror.apply(snapshot("n", ExtentStored("x", Tier.DRAM, contents["x"]), load("r")))
    assert not mirror.apply(later)
    assert mirror.position("n") == (None, 0)
    assert mirror.loads == {}
    assert mirror.longest_prefix(CHAIN).nodes == {}
    mirror.check_integrity()


def test_restart_of_a_node_store_replaces_all_it_said() -> None:
    mirror = Mirror(Clock())
    mirror.apply(snapshot("n", ExtentStored("x", Tier.DRAM, contents["x"]), next_number=7))
    mirror.apply(snapshot("n", ExtentStored("x", Tier.DISK, contents["x"]), epoch="second"))
    assert mirror.longest_prefix(CHAIN).nodes == {"n": bytes([IN_DISK, IN_DISK])}
    assert mirror.position("n") == ("second", 0)


def test_a_dead_node_leaves_the_others_untouched() -> None:
    mirror = Mirror(Clock())
    for node_id in ("n0", "n1"):
        stored = ExtentStored("x", Tier.DRAM, contents["x"])
        mirror.apply(snapshot(node_id, stored, DeviceBlocks(f"{node_id}-r", packed([0]), b""), load(f"{node_id}-r")))
    mirror.forget_node("n0")
    mirror.check_integrity()
    found = mirror.longest_prefix(CHAIN)
    assert (set(found.nodes), found.devices, set(mirror.loads)) == ({"n1"}, {"n1-r": 1}, {"n1-r"})
    assert repr(mirror) == "<Mirror nodes=1 replicas=1 blocks=2 predictions=0>"


def test_a_silent_node_becomes_stale_and_an_empty_batch_refreshes_it() -> None:
    clock = Clock()
    mirror = Mirror(clock, stale_after_s=10)
    assert mirror.is_stale("n"), "never heard of"
    mirror.apply(snapshot("n", ExtentStored("x", Tier.DRAM, contents["x"])))
    clock.now_s += 10.5
    assert mirror.is_stale("n")
    assert mirror.longest_prefix(CHAIN).nodes == {}
    mirror.apply(EventBatch("n", "e", 0, False, ()))
    assert not mirror.is_stale("n")
    assert len(mirror.longest_prefix(CHAIN).nodes["n"]) == 2


def test_predictions_count_as_device_blocks_until_they_expire() -> None:
    clock = Clock()
    mirror = Mirror(clock, prediction_ttl_s=5)
    mirror.apply(snapshot("n", load("r"), DeviceBlocks("r", packed([0]), b"")))
    mirror.predict("r", CHAIN[:3])
    clock.now_s += 3
    mirror.predict("r", CHAIN[:2])
    assert mirror.longest_prefix(CHAIN).devices == {"r": 3}
    clock.now_s += 3
    assert mirror.longest_prefix(CHAIN).devices == {"r": 2}, "the second prediction is younger"
    mirror.check_integrity()
    clock.now_s += 3
    assert mirror.longest_prefix(CHAIN).devices == {"r": 1}, "reported blocks stay"
    assert repr(mirror) == "<Mirror nodes=1 replicas=1 blocks=1 predictions=0>"


def test_predictions_go_with_their_replica() -> None:
    mirror = Mirror(Clock())
    mirror.apply(snapshot("n", load("r")))
    mirror.predict("r", CHAIN)
    mirror.predict("never-heard-of", CHAIN)
    mirror.apply(EventBatch("n", "e", 1, False, (ReplicaGone("r"),)))
    # The bit of r's pool is free again and goes to r2, which must not inherit anything.
    mirror.apply(EventBatch("n", "e", 2, False, (DeviceBlocks("r2", packed([5]), b""),)))
    mirror.check_integrity()
    assert mirror.longest_prefix(CHAIN).devices == {}
