"""One request as the engine sees it: its tokens, its blocks, how far it has been computed.

    prompt                     output
    t0 t1 t2 ... t(p-1)        o0 o1 ... o(k-1)
    |<---- num_computed ---->| |<- not computed yet ->|      KV is in the pool for the first `num_computed`

The last sampled token is never computed before the next step needs it, so at the end of a turn all tokens but
the last have KV.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from cache.events import Tier
from cache.extent import NOBODY, Origin
from cache.hashing import BlockHash, TokenIds, block_hash
from serving.engine.block_pool import Owner
from serving.engine.detokenizer import IncrementalDetokenizer
from serving.engine.grammar import Matcher
from serving.engine.meeting import Meeting
from serving.protocol import LoadPlan, Logits, SamplingParams, TokenBatch, Usage


class Status(Enum):
    """Where a sequence stands."""

    COMPILING = "compiling"
    """Its grammar is being compiled; the scheduler does not know it yet."""
    WAITING = "waiting"
    """No blocks yet."""
    LOADING = "loading"
    """Has its blocks; stored KV, or a prefill replica's, is on its way into them, or may be computed meanwhile."""
    RUNNING = "running"
    OFFLOADING = "offloading"
    """Preempted: its blocks are on their way into the warehouse, then they are given back."""
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What an engine is asked to do."""

    request_id: str
    token_ids: TokenIds
    root_hash: BlockHash
    block_hashes: tuple[BlockHash, ...]
    """Of the full blocks of `token_ids`."""
    sampling: SamplingParams | None
    """None: prefill only, nothing is sampled."""
    use_cache: bool = True
    """False: pool and warehouse are not looked up and nothing is kept."""
    handoff_owner: str | None = None
    """Prefill: blocks are handed off to this owner as they are computed."""
    handoff_first_block: int = 0
    wants_logits: bool = False
    """Prefill: the listener is given the logits after the last token."""
    num_choices: int = 1
    """Answers wanted to this prompt; the others are requests of their own that find its blocks in the pool."""
    generated: tuple[int, ...] = ()
    """Output tokens that another engine has sent already; the answer goes on behind them."""
    reason: str = ""
    """The router's, passed through to the usage."""
    origin: Origin = NOBODY
    """Whose KV it becomes, for purges."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where results go. Must not block. One that raises has its request cancelled.

    Called from the step loop, `on_progress` also from the one thread that stores.
    """

    on_batch: Callable[[TokenBatch], None] = lambda batch: None
    on_progress: Callable[[int, int, bool], None] = lambda num_tokens, num_computed, is_done: None
    """Prefill: tokens that can be loaded now, tokens computed so far, whether this is the last word."""
    on_logits: Callable[[Logits], None] = lambda logits: None
    """Prefill: those after the last token, before its KV can be loaded."""
    ask_prefill: Callable[["Sequence"], bool] | None = None
    """Decode: ask a prefill replica for the uncached rest; False if there is none to ask."""


@dataclass(slots=True, eq=False)
class Sequence:
    """See the module's docstring. Belongs to the step loop; other threads read what a job of theirs was given."""

    request: EngineRequest
    listener: Listener
    block_size: int
    arrived_at: float
    detokenizer: IncrementalDetokenizer | None = None
    matcher: Matcher | None = None
    """Where the answer stands in its grammar, if it has one. It has read all output tokens, preempted or not."""
    status: Status = Status.WAITING
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    num_computed: int = 0
    off_chain_from: int | None = None
    """Position of the first token whose KV has other numerics than its chain; None if none has."""
    num_registered_blocks: int = 0
    """Leading blocks that the pool's index knows."""
    is_handoff_open: bool = False
    """A prefill replica is at work for this sequence."""
    has_asked_prefill: bool = False
    holds_handoff: bool = False
    """Decode: the store keeps for it what the prefill replica has handed off."""
    announced_tokens: int = 0
    """Decode: leading tokens that the prefill replica has handed off so far."""
    announced_node_id: str | None = None
    tried_tokens: int = 0
    """Decode: announced tokens that a load has been tried for; it may have brought less."""
    offered_tokens: int = 0
    """Prefill: leading tokens offered to the store so far."""
    meeting: Meeting | None = None
    """Its load of stored KV, until everything that was loaded has joined what was computed."""
    num_loads: int = 0
    """Loads of stored KV begun; each has leases of its own."""
    plan: LoadPlan | None = None
    is_load_in_flight: bool = False
    num_stores_in_flight: int = 0
    is_purged: bool = False
    """Somebody has ordered its KV to be deleted: what is still computed is not kept either."""
    cached_tokens: dict[Tier, int] = field(default_factory=dict)
    remote_tokens: int = 0
    prefill_tokens: int = 0
    """Prompt tokens that came from the prefill replica."""
    num_prompt_computed: int = 0
    """Prompt tokens computed here."""
    num_accounted_tokens: int = 0
    """Prompt tokens whose origin is known; what a preempted sequence computes again is not counted again."""
    num_preemptions: int = 0
    last_batch: TokenBatch | None = None
    """What ends the answer, without the usage. It waits for the KV of a prompt whose first token was the last."""
    load_s: float = 0.0
    first_token_at: float | None = None
    _tokens: TokenIds = field(default_factory=lambda: np.empty(0, np.int32))
    _num_tokens: int = 0
    owner: Owner = field(init=False)

    def __post_init__(self) -> None:
        self.owner = Owner(self.request.root_hash, self.request.origin)
        prompt = self.request.token_ids
        max_new = self.request.sampling.max_tokens if self.request.sampling else 0
        self._tokens = np.empty(len(prompt) + max_new, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._num_tokens = len(prompt)
        self.block_hashes = list(self.request.block_hashes)
        for token_id in self.request.generated:
            self.append(token_id)
            if self.detokenizer is not None:
                self.detokenizer.push(token_id)  # its text has been sent, too

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.request_id} {self.status.value} {self.num_computed}/{self.num_tokens} tokens, "
            f"{len(self.block_table)} blocks>"
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def uses_pool(self) -> bool:
        """Its blocks may be found in the pool: by anybody, or by its own other choices alone.

        Without the cache a request's hashes have a root that nobody else has.
        """
        return self.request.use_cache or self.request.num_choices > 1

    @property
    def is_kept(self) -> bool:
        """Its KV may go into the warehouse and stay there."""
        return self.request.use_cache and not self.is_purged

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_output_tokens(self) -> int:
        return self._num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return self._num_tokens - self.num_computed

    @property
    def token_ids(self) -> TokenIds:
        """All tokens, prompt and output; a view."""
        return self._tokens[: self._num_tokens]

    @property
    def reusable_tokens(self) -> TokenIds:
        """Tokens whose KV may come from a cache: all, or all but the last if its logits must be computed here."""
        return self.token_ids[:-1] if self.needs_logits else self.token_ids

    @property
    def needs_logits(self) -> bool:
        """Whether the logits after the last token are wanted, to sample from or to pass on."""
        return self.request.sampling is not None or self.request.wants_logits

    @property
    def reusable_hashes(self) -> tuple[BlockHash, ...]:
        return tuple(self.block_hashes[: len(self.reusable_tokens) // self.block_size])

    @property
    def is_idle(self) -> bool:
        """No thread of the loader reads or writes its blocks."""
        return not self.is_load_in_flight and not self.num_stores_in_flight

    @property
    def num_chain_tokens(self) -> int:
        """Leading tokens whose KV is what their hashes stand for: others may find them, and they may be stored."""
        return self.num_computed if self.off_chain_from is None else min(self.off_chain_from, self.num_computed)

    @property
    def computed_hashes(self) -> tuple[BlockHash, ...]:
        """Hashes of the full blocks whose KV is whole and of the chain."""
        return tuple(self.block_hashes[: self.num_chain_tokens // self.block_size])

    def parent_hash(self, index: int) -> BlockHash:
        """Hash that block `index` is chained to."""
        return self.block_hashes[index - 1] if index else self.request.root_hash

    def block_token_ids(self, index: int) -> TokenIds:
        """Tokens of block `index`, as far as they are known."""
        return self.token_ids[index * self.block_size : (index + 1) * self.block_size]

    def account(self) -> int:
        """Count the prompt tokens that have KV for the first time, and return how many there are."""
        gained = max(0, min(self.num_computed, self.num_prompt_tokens) - self.num_accounted_tokens)
        self.num_accounted_tokens += gained
        return gained

    def append(self, token_id: int) -> None:
        """A sampled token; its block is hashed as soon as it is full."""
        self._tokens[self._num_tokens] = token_id
        self._num_tokens += 1
        if self._num_tokens % self.block_size == 0:
            index = len(self.block_hashes)
            self.block_hashes.append(block_hash(self.parent_hash(index), self.block_token_ids(index)))

    def usage(self) -> Usage:
        """What it cost so far."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_output_tokens,
            device_tokens=self.cached_tokens.get(Tier.DEVICE, 0),
            dram_tokens=self.cached_tokens.get(Tier.DRAM, 0),
            disk_tokens=self.cached_tokens.get(Tier.DISK, 0),
            remote_tokens=self.remote_tokens,
            prefill_tokens=self.prefill_tokens,
            decode_computed_tokens=self.num_prompt_computed,
            load_s=self.load_s,
            ttft_s=(self.first_token_at - self.arrived_at) if self.first_token_at is not None else 0.0,
            reason=self.request.reason,
            plan=self.plan,
        )
