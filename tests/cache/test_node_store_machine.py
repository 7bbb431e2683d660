"""A node store on memory and a real folder against a plain model, through everything that can happen to it.

The model is a list of chains: those that were ever stored, and those that must be found now. Whatever is
read is compared byte by byte with the true KV; a lookup finds no more than was ever stored and, as long as
the budgets allow it, no less than must be there.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.client import WarehouseClient
from cache.events import ExtentRemoved, ExtentStored, Tier
from cache.messages import PurgeQuery
from cache.node_store import NodeStore
from cache.occupancy import Budgets
from cache.tiers.disk import FileTier
from cache.tiers.index_db import IndexDb
from cache.tiers.memory import MemoryTier
from tests.cache.chains import (
    BLOCK_BYTES,
    IMAGE_BYTES,
    ROOT,
    budgets,
    crash,
    fill,
    offer,
    query,
    read_and_check,
    store_config,
)

Tokens = tuple[int, ...]

# Few different ids, so that chains share a beginning and fork anywhere, also inside a block of four.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=18).map(tuple)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class StoreMachine(RuleBasedStateMachine):
    """Roomy: nothing is ever evicted for want of room, so the model is exact."""

    limits: Budgets = budgets(blocks=2)
    is_roomy = True
    commit_interval_s = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="tokenloft-"))
        self.ever: list[Tokens] = []
        self.now: list[Tokens] = []
        self.durable: list[Tokens] = []
        self.num_requests = 0
        self.is_exact = self.is_roomy

    @initialize()
    def open(self) -> None:
        disk = FileTier(self.folder / "w", fsync=False, lock_wait_s=0.0)
        config = store_config(self.limits, retry_s=0.01, commit_interval_s=self.commit_interval_s)
        self.store = NodeStore(config, MemoryTier(), disk)
        self.client = WarehouseClient(self.store)
        self.held: set[tuple[str, Tier]] = set()
        self.epoch: str | None = None
        self.number = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.folder)

    # -- what clients do ----------------------------------------------------------------------------

    @rule(tokens=TOKENS, as_handoff=st.booleans())
    def store_chain(self, tokens: Tokens, as_handoff: bool) -> None:
        self.num_requests += 1
        owner = f"request {self.num_requests}" if as_handoff else None
        is_stored = self.client.store(offer(tokens, handoff_owner=owner), fill)
        self.ever.append(tokens)
        if is_stored:
            self.now.append(tokens)
        assert is_stored or not self.is_roomy
        if owner is not None:
            self.client.release(owner)

    @rule(stored=st.data(), rest=TOKENS)
    def extend_or_fork(self, stored: st.DataObject, rest: Tokens) -> None:
        if self.ever:
            base = stored.draw(st.sampled_from(self.ever))
            at = stored.draw(st.integers(0, len(base)))
            self.store_chain((base[:at] + rest)[:30], as_handoff=False)

    @rule(tokens=TOKENS, first=st.integers(0, 2))
    def load(self, tokens: Tokens, first: int) -> None:
        first = min(first, len(tokens) // 4)
        found = read_and_check(self.client, query(tokens, first=first)).tokens
        most = max((common(chain, tokens) for chain in self.ever), default=0)
        least = max((common(chain, tokens) for chain in self.now), default=0)
        assert found <= most
        if self.is_exact:
            assert found >= (least if least > first * 4 else 0)

    @rule(tokens=TOKENS)
    def give_a_store_up(self, tokens: Tokens) -> None:
        grant = self.store.prepare_store(offer(tokens))
        self.store.abort_store(tuple(header.extent_id for header in grant.extents))

    @rule(tokens=TOKENS)
    def hold_a_lease(self, tokens: Tokens) -> None:
        self.store.prepare_load(query(tokens, "holder"))

    @rule()
    def end_the_lease(self) -> None:
        self.store.complete_load("holder")

    @rule()
    def purge_all(self) -> None:
        receipt = self.store.purge(PurgeQuery(root_hash=ROOT))
        assert (receipt.num_left, receipt.num_kept_blocks) == (0, 0)
        assert list(self.folder.glob("w/extents/*/*/*")) == []
        stats = self.store.stats()
        assert (stats.num_extents, stats.num_blocks, stats.dirty_bytes) == (0, 0, 0)
        assert (stats.dram_bytes, stats.disk_bytes, stats.handoff_bytes) == (0, 0, 0)
        self.ever, self.now, self.durable = [], [], []

    # -- what happens to the store ------------------------------------------------------------------

    @rule()
    def flush(self) -> None:
        assert self.store.flush()
        self.durable = list(self.now)

    @rule(loses_index=st.booleans())
    def close_and_open(self, loses_index: bool) -> None:
        self.store.close()
        if loses_index:
            IndexDb.remove(self.folder / "w" / "index.sqlite")
        self.open()

    @rule()
    def crash_and_open(self) -> None:
        crash(self.store)
        self.now = list(self.durable)
        self.open()

    # Which files there are depends on the writer's pace, so what is drawn must not depend on the files.
    @precondition(lambda self: self.ever)
    @rule(which=st.integers(0, 2**16), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
    def damage_a_file(self, which: int, where: float, flip: int) -> None:
        self.flush()
        files = sorted(self.folder.glob("w/extents/*/*/*.kv"))
        if not files:
            return
        path = files[which % len(files)]
        at = int(where * path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ flip]))
        # A damaged file counts as stored until somebody reads it: from here on only the bytes are checked.
        self.is_exact = False

    # -- what always holds --------------------------------------------------------------------------

    @invariant()
    def books_are_sound(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        stats = self.store.stats()
        assert stats.dram_bytes <= stats.dram_budget_bytes
        assert stats.disk_bytes <= stats.disk_budget_bytes
        assert stats.handoff_bytes <= stats.handoff_budget_bytes

    @invariant()
    def followers_know_what_is_where(self) -> None:
        if not hasattr(self, "store"):
            return
        batch = self.store.read_events(self.epoch, self.number)
        if batch.is_snapshot:
            self.held.clear()
        for event in batch.events:
            if isinstance(event, ExtentStored):
                self.held.add((event.extent_id, event.tier))
            elif isinstance(event, ExtentRemoved):
                self.held.discard((event.extent_id, event.tier))
        self.epoch, self.number = batch.epoch, batch.next_number
        snapshot = self.store.read_events(None, 0)
        if snapshot.next_number == batch.next_number:  # else the writer has been busy in between
            told = {(e.extent_id, e.tier) for e in snapshot.events if isinstance(e, ExtentStored)}
            behind = self.store.read_events(self.epoch, self.number).events
            assert behind or told == self.held


class TinyStoreMachine(StoreMachine):
    """Room for a few extents only: everything is evicted, promoted, refused and dropped all the time."""

    limits = Budgets(4 * IMAGE_BYTES, 5 * IMAGE_BYTES, 2 * IMAGE_BYTES, 2 * BLOCK_BYTES, 2)
    is_roomy = False


class TinyBatchedMachine(TinyStoreMachine):
    """The same, with several writes made durable together."""

    commit_interval_s = 0.02


class TinyDiskMachine(StoreMachine):
    """A disk tier of one extent."""

    limits = Budgets(6 * IMAGE_BYTES, IMAGE_BYTES, 3 * IMAGE_BYTES, BLOCK_BYTES, 4)
    is_roomy = False


for machine in (StoreMachine, TinyStoreMachine, TinyBatchedMachine, TinyDiskMachine):
    machine.TestCase.settings = settings(
        max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
TestRoomyStore = StoreMachine.TestCase
TestTinyStore = TinyStoreMachine.TestCase
TestTinyBatched = TinyBatchedMachine.TestCase
TestTinyDisk = TinyDiskMachine.TestCase
