"""What readers and writers say to a node store, and what it answers: plain frozen values."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from cache.events import Tier
from cache.extent import NOBODY, ExtentHeader, KVShape, Origin
from cache.hashing import BlockHash, TokenIds
from cache.locked import LockedExtent


@dataclass(frozen=True, slots=True)
class LoadQuery:
    """Which stored blocks continue this prompt? Matched blocks are leased to `owner`."""

    root_hash: BlockHash
    block_hashes: tuple[BlockHash, ...]
    """Of the full blocks of `token_ids`."""
    token_ids: TokenIds
    block_size: int
    first_block: int
    """The reader has all blocks before this one already."""
    owner: str
    """Leases go by owner, usually a request id; `complete_load(owner)` ends them."""


class LoadPiece(NamedTuple):
    """Consecutive blocks that lie together in one extent."""

    extent_id: str
    tier: Tier
    first_block: int
    """Position of the first block in the prompt, in blocks."""
    num_tokens: int
    """Prompt tokens covered; the last block may be covered in part."""
    index_in_extent: int
    """Which block of the extent comes first."""
    source: Any
    """Dram: what the dram tier gives a reader (an array, a Ray object reference). Disk: the file's path."""


@dataclass(frozen=True, slots=True)
class LoadGrant:
    """Answer to a `LoadQuery`: pieces in the order of the prompt, without gaps, empty on a miss."""

    pieces: tuple[LoadPiece, ...] = ()
    num_tokens: int = 0
    """How many prompt tokens are covered, those before `first_block` included; 0 on a miss."""


@dataclass(frozen=True, slots=True)
class StoreOffer:
    """A chain of computed blocks: the store takes the ones it lacks."""

    root_hash: BlockHash
    block_hashes: tuple[BlockHash, ...]
    """Of all full blocks of `token_ids`."""
    token_ids: TokenIds
    """All tokens whose KV was computed, from the start of the prompt."""
    block_size: int
    shape: KVShape
    first_block: int
    """Blocks before this one are known to be stored."""
    with_tail: bool = True
    """Also keep the partial block at the end."""
    handoff_owner: str | None = None
    """Set for a handoff: leased to this owner, outside the cache's budget, never dropped by write-behind."""
    is_transient: bool = False
    """Forgotten as soon as its leases end, and never written to disk (handoff with the cache switched off)."""
    origin: Origin = NOBODY


@dataclass(frozen=True, slots=True)
class StoreGrant:
    """Answer to a `StoreOffer`: extents to fill now. Each must be completed or aborted.

    With no extents and no `refusal` everything offered is stored.
    """

    extents: tuple[ExtentHeader, ...] = ()
    refusal: str | None = None
    """Why nothing was granted although something is missing."""
    has_more: bool = False
    """More is missing than was granted at once: offer again."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """State of one node store. Bytes count whole images, headers included."""

    node_id: str
    directory: str | None
    state: str
    """`ok`, or `degraded: <reason>`."""
    num_extents: int
    num_blocks: int
    dram_bytes: int
    dram_budget_bytes: int
    disk_bytes: int
    disk_budget_bytes: int
    handoff_bytes: int
    handoff_budget_bytes: int
    dirty_bytes: int
    num_recovered_blocks: int
    num_locked_extents: int = 0
    """On disk, but encrypted with a key that is not here: they only take room."""
    num_extents_to_scrub: int = 0
    """Left of the present round."""
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PurgeQuery:
    """What to delete: extents to which everything that is given applies. ValueError if nothing is given."""

    tenant: str | None = None
    session: str | None = None
    """Extents that this session stored, except those that hold history of another session too."""
    root_hash: BlockHash | None = None
    """One fingerprint."""

    def __post_init__(self) -> None:
        if self.tenant is None and self.session is None and self.root_hash is None:
            raise ValueError("a purge needs a tenant, a session or a fingerprint")

    def means(self, extent: ExtentHeader | LockedExtent) -> bool | None:
        """None if only the key of an encrypted extent can tell."""
        if isinstance(extent, ExtentHeader):
            return self.means_all_of(extent.root_hash, extent.origin)
        if self.tenant not in (None, extent.tenant) or self.root_hash not in (None, extent.root_hash):
            return False
        return True if self.session is None else None

    def means_all_of(self, root_hash: BlockHash, origin: Origin) -> bool:
        """Whether KV of this fingerprint and this origin is meant."""
        return (
            self.tenant in (None, origin.tenant)
            and self.session in (None, origin.session)
            and self.root_hash in (None, root_hash)
        )


@dataclass(frozen=True, slots=True)
class PurgeReceipt:
    """What a purge has deleted. Bytes count whole images, headers included."""

    num_extents: int = 0
    num_blocks: int = 0
    num_tokens: int = 0
    dram_bytes: int = 0
    disk_bytes: int = 0
    num_files: int = 0
    num_kept_blocks: int = 0
    """Blocks of the session that are also the history of another one, and stay for it."""
    num_left: int = 0
    """Extents that a lookup still found afterwards; anything but 0 means that the disk refused to delete."""
    num_unknown: int = 0
    """Encrypted extents that may belong to the session: without their key that can't be told, and they stay."""

    @classmethod
    def sum_of(cls, receipts: Sequence["PurgeReceipt"]) -> "PurgeReceipt":
        """One receipt for several node stores."""
        return cls(**{each.name: sum(getattr(receipt, each.name) for receipt in receipts) for each in fields(cls)})
