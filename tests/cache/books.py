"""A ledger with its caller's verbs, for tests: extents of one block, a clock that is told the time, a ready disk."""

from collections.abc import Sequence

from cache.events import Event
from cache.extent import ExtentHeader
from cache.ledger import Ledger, StoreDecision
from cache.messages import LoadQuery, PurgeQuery, PurgeReceipt, StoreOffer
from cache.occupancy import Budgets, Drop
from tests.cache.chains import BLOCK_SIZE, IMAGE_BYTES, budgets, header_of, offer, query


class Books:
    """Budgets in extents, or `limits` in bytes. After every verb the books are checked."""

    def __init__(self, dram: int = 4, disk: int = 0, handoff: int = 4, limits: Budgets | None = None) -> None:
        sizes = (number * IMAGE_BYTES for number in (dram, disk, handoff))
        self.events: list[Event] = []
        self.ledger = Ledger(limits or budgets(*sizes), self.events.append, lease_ttl_s=60.0)
        self.now = 0.0
        self.drops: list[Drop] = []

    def offer(self, offered: StoreOffer) -> StoreDecision:
        decision = self.ledger.prepare_store(offered, self.now)
        self.drops += decision.drops
        self.ledger.check_integrity()
        return decision

    def prepare(
        self, tokens: Sequence[int], handoff_owner: str | None = None, transient: bool = False
    ) -> StoreDecision:
        return self.offer(offer(tokens, handoff_owner=handoff_owner, is_transient=transient))

    def store(self, tokens: Sequence[int], handoff_owner: str | None = None, transient: bool = False) -> bool:
        """Offer and complete until all is stored; False if some was refused."""
        return self.store_offer(offer(tokens, handoff_owner=handoff_owner, is_transient=transient))

    def store_offer(self, offered: StoreOffer) -> bool:
        while True:
            decision = self.offer(offered)
            for header in decision.granted:
                assert self.ledger.complete_store(header.extent_id, self.now)
                self.ledger.check_integrity()
            if not decision.granted or not decision.has_more:
                return not (decision.is_full or decision.is_busy)

    def begin_write(self) -> ExtentHeader | None:
        """The next extent that goes to disk."""
        header, drops = self.ledger.disk.next_write()
        self.drops += drops
        self.ledger.check_integrity()
        return header

    def write_behind(self) -> list[str]:
        """Write everything that is dirty; the ids written."""
        written: list[str] = []
        while (header := self.begin_write()) is not None:
            self.drops += self.ledger.disk.written(header.extent_id)
            self.ledger.check_integrity()
            written.append(header.extent_id)
        return written

    def load(self, asked: LoadQuery) -> tuple[int, int]:
        """How many runs and how many tokens of the prompt a lookup finds."""
        runs = self.ledger.prepare_load(asked, self.now)
        self.ledger.check_integrity()
        return len(runs), runs[-1].first_block * BLOCK_SIZE + runs[-1].num_tokens if runs else 0

    def found(self, tokens: Sequence[int], owner: str = "reader", *, release: bool = True) -> int:
        _, num_tokens = self.load(query(tokens, owner))
        if release:
            self.release(owner)
        return num_tokens

    def release(self, owner: str) -> None:
        self.drops += self.ledger.complete_load(owner)
        self.ledger.check_integrity()

    def expire(self) -> None:
        self.drops += self.ledger.expire(self.now)
        self.ledger.check_integrity()

    def purge(self, asked: PurgeQuery) -> PurgeReceipt:
        purged = self.ledger.purge(asked)
        self.drops += purged.drops
        self.ledger.check_integrity()
        return purged.receipt


def chain(number: int, num_blocks: int = 1, tail: int = 0) -> list[int]:
    """Tokens that no other number shares."""
    return [number * 1000 + i for i in range(num_blocks * BLOCK_SIZE + tail)]


def last_extent(tokens: Sequence[int]) -> ExtentHeader:
    """Of the last block, full or not."""
    return header_of(tokens, first=max(0, (len(tokens) - 1) // BLOCK_SIZE))
