"""What readers and writers say to a node store, and what it answers: plain frozen values."""

from dataclasses import dataclass, field
from typing import Any

from cache.events import Tier
from cache.extent import ExtentHeader, KVShape
from cache.hashing import BlockHash, TokenIds


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


@dataclass(frozen=True, slots=True)
class LoadPiece:
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
    counters: dict[str, int] = field(default_factory=dict)
