"""The ledger with each policy: whatever the policy says, leases hold and the books agree."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cache.events import Tier
from cache.eviction import POLICIES, PolicyName
from cache.extent_tree import Extent
from cache.ledger import Ledger
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, budgets, offer, query

TIERS: tuple[Tier, ...] = (Tier.DRAM, Tier.DISK)
CHAINS = [[number * 1000 + i for i in range(4 * BLOCK_SIZE)] for number in range(4)]
CHAINS.append(CHAINS[0][: 2 * BLOCK_SIZE] + CHAINS[1][: 2 * BLOCK_SIZE])
PROMPTS = st.tuples(st.sampled_from(CHAINS), st.integers(1, 4 * BLOCK_SIZE)).map(lambda pair: pair[0][: pair[1]])
STEPS = st.lists(st.tuples(st.sampled_from(["store", "load", "release", "write", "promote"]), PROMPTS), max_size=40)


class LeasedLedger:
    """A ledger with room for a few blocks, and what its readers hold."""

    def __init__(self, policy: PolicyName) -> None:
        limits = budgets(dram=4 * IMAGE_BYTES, disk=6 * IMAGE_BYTES)
        self.ledger = Ledger(limits, lambda _: None, POLICIES[policy])
        self.leased: dict[str, tuple[list[Extent], set[tuple[str, Tier]]]] = {}

    def store(self, tokens: list[int]) -> None:
        for header in self.ledger.prepare_store(offer(tokens), 0.0).granted:
            self.ledger.complete_store(header.extent_id, 0.0)

    def load(self, tokens: list[int]) -> None:
        owner = f"{len(self.leased)}"
        runs = self.ledger.prepare_load(query(tokens, owner), 0.0)
        extents = [run.extent for run in runs]
        tiers = {(e.extent_id, tier) for e in extents for tier in TIERS if e.is_in(tier)}
        self.leased[owner] = (extents, tiers)

    def release(self, _: list[int]) -> None:
        if self.leased:
            owner, _held = self.leased.popitem()
            self.ledger.complete_load(owner)

    def write(self, _: list[int]) -> None:
        header, _drops = self.ledger.disk.next_write()
        if header is not None:
            self.ledger.disk.written(header.extent_id)

    def promote(self, tokens: list[int]) -> None:
        for run in self.ledger.prepare_load(query(tokens, "promoting"), 0.0):
            if self.ledger.disk.prepare_promote(run.extent.extent_id) is not None:
                self.ledger.disk.complete_promote(run.extent.extent_id, succeeded=True)
        self.ledger.complete_load("promoting")

    def check(self) -> None:
        self.ledger.check_integrity()
        for extents, tiers in self.leased.values():
            for extent in extents:
                assert self.ledger.held.find(extent.extent_id) is extent, "a leased extent was dropped"
            for extent_id, tier in tiers:
                found = self.ledger.held.find(extent_id)
                assert found is not None
                assert found.is_in(tier), f"a leased extent has left {tier.value}"


@settings(max_examples=150)
@given(policy=st.sampled_from(list(POLICIES)), steps=STEPS)
def test_no_policy_makes_the_ledger_drop_what_is_leased(policy: PolicyName, steps: list[tuple[str, list[int]]]) -> None:
    books = LeasedLedger(policy)
    for step, tokens in steps:
        getattr(books, step)(tokens)
        books.check()
