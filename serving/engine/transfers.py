"""What a sequence loads, hands off and leaves behind. Part of the step loop: decides and posts jobs.

    decode:   admitted -> load what is stored, or compute it, or both at once (see `meeting` and `planner`)
                                              -> short rest: compute it
                                              -> long rest: ask a prefill replica, load its blocks as announced
              finished -> commit all blocks, the decoded ones and the tail too
    prefill:  admitted -> load what is stored -> hand off what is there -> after each step hand off the new blocks

A decode replica computes from the front itself beside a load, and asks a prefill replica for the rest when the two
have met: what is stored would have to come through the same tier for the other, too. Only what a load has left
behind because it failed may go to a prefill replica, if it is long.
An engine of other numerics than its chains (see `EngineConfig.is_off_chain`) reads what others have computed; what it
computes itself stays with its sequence and is neither registered nor stored, so no chain ever mixes numerics.
A sequence's blocks are given back only when no loader thread reads or writes them any more.
"""

import logging
from collections import Counter
from collections.abc import Callable

from cache.events import Tier
from cache.extent import KVShape
from cache.hashing import block_hash
from cache.messages import LoadQuery, StoreOffer
from serving.engine.block_pool import BlockPool
from serving.engine.loader import Loader, LoadJob, LoadResult, MeetingJob, StoreJob
from serving.engine.meeting import Meeting
from serving.engine.planner import Planner
from serving.engine.sequence import Sequence, Status
from serving.protocol import LoadPlan

logger = logging.getLogger("tokenloft.engine")

Post = Callable[[Callable[[], None]], object]


class Transfers:
    """See the module's docstring. Without a loader everything is computed and nothing is kept but the pool.

    `shape` is that of the KV as it is stored.
    """

    def __init__(
        self,
        loader: Loader | None,
        planner: Planner,
        pool: BlockPool,
        shape: KVShape,
        counters: Counter[str],
        post: Post,
        on_finished: Callable[[Sequence], None],
        remote_threshold_tokens: int,
    ) -> None:
        self._loader = loader
        self._planner = planner
        self._pool = pool
        self._block_size = pool.block_size
        self._shape = shape
        self._counters = counters
        self._post = post
        self._on_finished = on_finished
        self._remote_threshold_tokens = remote_threshold_tokens

    # -- loading ------------------------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """The sequence has its blocks and what the pool had of it: look for more in the warehouse."""
        sequence.off_chain_from = None  # a preempted one has lost what it had computed
        self._count_cached(sequence, Tier.DEVICE, sequence.account())
        num_tokens = len(sequence.reusable_tokens)
        may_load = self._loader is not None and sequence.request.use_cache and not self._planner.never_loads
        if may_load and sequence.num_computed < num_tokens:
            self._load_stored(sequence, num_tokens)
        else:
            self._plan_rest(sequence)

    def _load_stored(self, sequence: Sequence, num_tokens: int) -> None:
        """Ask the store for what continues the sequence, up to its first `num_tokens` tokens."""
        assert self._loader is not None
        sequence.status = Status.LOADING
        sequence.is_load_in_flight = True
        sequence.num_loads += 1
        first_token = sequence.num_computed
        meeting = Meeting(first_token, num_tokens, self._block_size, self._planner.now())
        sequence.meeting = meeting
        # Leases of its own: a load that was met ends them when the next one may have begun.
        owner = f"{sequence.request_id}/load {sequence.num_loads}"
        self._loader.load_to_meet(
            MeetingJob(
                self._query(sequence, num_tokens, owner),
                tuple(sequence.block_table),
                meeting,
                first_token,
                lambda grant: self._planner.plan(grant, first_token),
                lambda plan: self._post(lambda: self._on_planned(sequence, plan)),
                lambda seconds: self._post(lambda: self._on_load_ended(sequence, meeting, seconds)),
            )
        )

    def _query(self, sequence: Sequence, num_tokens: int, owner: str) -> LoadQuery:
        return LoadQuery(
            sequence.request.root_hash,
            tuple(sequence.block_hashes[: num_tokens // self._block_size]),
            sequence.token_ids[:num_tokens].copy(),
            self._block_size,
            sequence.num_computed // self._block_size,
            owner,
        )

    def _on_planned(self, sequence: Sequence, plan: LoadPlan) -> None:
        sequence.plan = sequence.plan or plan
        self._counters[f"plans_to_{plan.kind}"] += 1

    def share_of_loading(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of a loading sequence, `budget` at most, to compute in the next step. They must be."""
        meeting = sequence.meeting
        if meeting is None or not self._planner.may_compute(meeting):
            return 0
        self._take_loaded(sequence, meeting)  # what a load has brought before it was turned
        return meeting.claim_front(self._planner.chunk(meeting, sequence.num_computed, budget))

    def on_computed(self, sequence: Sequence) -> None:
        """More of the sequence has KV after a step."""
        self.end_handoff(sequence)  # not before: what is let go of is written to disk, and this step would wait
        meeting = sequence.meeting
        if meeting is not None and meeting.meet(sequence.num_computed):
            if sequence.is_load_in_flight:  # it is ending, and writes nothing any more
                sequence.is_load_in_flight = False
                sequence.load_s += self._planner.now() - meeting.began_at
            self._join(sequence, meeting)
        self.register_full_blocks(sequence)
        self.hand_off(sequence)

    def _on_load_ended(self, sequence: Sequence, meeting: Meeting, seconds: float) -> None:
        if sequence.meeting is not meeting or not sequence.is_load_in_flight:
            return  # met before it had ended
        sequence.is_load_in_flight = False
        sequence.load_s += seconds
        if sequence.status is Status.FINISHED:
            self.release_if_idle(sequence)
            return
        meeting.end_load()
        self._join(sequence, meeting)

    def _join(self, sequence: Sequence, meeting: Meeting) -> None:
        """The load has ended: what it has brought goes to what is computed, if nothing is missing between the two."""
        self._take_loaded(sequence, meeting)
        self.register_full_blocks(sequence)
        is_gap_long = meeting.back - sequence.num_computed >= self._remote_threshold_tokens
        if meeting.has_more and not (is_gap_long and self._can_ask_prefill(sequence)):
            return
        sequence.meeting = None
        self._plan_rest(sequence)

    def _take_loaded(self, sequence: Sequence, meeting: Meeting) -> None:
        while (loaded := meeting.take(sequence.num_computed)) is not None:
            self._counters["loaded_tokens"] += loaded.end - sequence.num_computed
            sequence.num_computed = loaded.end
            self._count_tiers(sequence, loaded.by_tier, sequence.account())

    def _load_announced_from(self, sequence: Sequence, num_tokens: int, node_id: str | None) -> None:
        """Ask the store for what a prefill replica has handed off, up to the sequence's first `num_tokens` tokens."""
        assert self._loader is not None
        sequence.status = Status.LOADING
        sequence.is_load_in_flight = True
        query = self._query(sequence, num_tokens, sequence.request_id)

        def on_done(result: LoadResult) -> None:
            self._post(lambda: self._on_handoff_loaded(sequence, result))

        # The leases hold blocks that are still to be loaded; `end_handoff` releases them.
        job = LoadJob(query, tuple(sequence.block_table), sequence.num_computed, on_done, node_id, keep_lease=True)
        self._loader.load(job)

    def _on_handoff_loaded(self, sequence: Sequence, result: LoadResult) -> None:
        sequence.is_load_in_flight = False
        sequence.load_s += result.seconds
        if sequence.status is Status.FINISHED:
            sequence.holds_handoff = True  # the load has leased again what was let go of
            self.end_handoff(sequence)
            self.release_if_idle(sequence)
            return
        self._counters["loaded_tokens"] += result.num_tokens - sequence.num_computed
        sequence.num_computed = result.num_tokens
        sequence.prefill_tokens += sequence.account()
        self.register_full_blocks(sequence)
        self._plan_rest(sequence)

    def _count_tiers(self, sequence: Sequence, by_tier: dict[Tier, int], gained: int) -> None:
        for tier, num_tokens in by_tier.items():
            self._count_cached(sequence, tier, min(num_tokens, gained))
            gained -= min(num_tokens, gained)

    def _count_cached(self, sequence: Sequence, tier: Tier, num_tokens: int) -> None:
        sequence.cached_tokens[tier] = sequence.cached_tokens.get(tier, 0) + num_tokens
        self._counters[f"{tier.value}_tokens"] += num_tokens

    def _plan_rest(self, sequence: Sequence) -> None:
        """What is stored is here: have the rest computed, by a prefill replica if it is long."""
        ask = sequence.listener.ask_prefill
        if ask is not None and self._can_ask_prefill(sequence):
            sequence.has_asked_prefill = sequence.holds_handoff = True
            sequence.is_handoff_open = ask(sequence)
        if self._load_announced(sequence):
            return
        if sequence.is_handoff_open:
            sequence.status = Status.LOADING
            return
        sequence.status = Status.RUNNING
        if sequence.last_batch is not None:
            self._on_finished(sequence)
        else:
            self.hand_off(sequence)

    def _can_ask_prefill(self, sequence: Sequence) -> bool:
        return (
            sequence.listener.ask_prefill is not None
            and not sequence.has_asked_prefill
            and sequence.num_uncomputed >= self._remote_threshold_tokens
        )

    # -- handoff, decode's side ---------------------------------------------------------------------

    def on_handoff(self, sequence: Sequence, num_tokens: int, node_id: str | None) -> None:
        """The prefill replica announces that blocks up to `num_tokens` can be loaded."""
        if not sequence.is_handoff_open:
            return
        # Never the last token while its logits are wanted here.
        num_tokens = min(num_tokens, len(sequence.reusable_tokens))
        sequence.announced_tokens = max(sequence.announced_tokens, num_tokens)
        sequence.announced_node_id = node_id
        if not sequence.is_load_in_flight:
            self._load_announced(sequence)

    def _load_announced(self, sequence: Sequence) -> bool:
        """Load what has been announced since the last time; False if there is nothing."""
        if sequence.announced_tokens <= max(sequence.tried_tokens, sequence.num_computed):
            return False
        sequence.tried_tokens = sequence.announced_tokens
        self._load_announced_from(sequence, sequence.announced_tokens, sequence.announced_node_id)
        return True

    def on_handoff_closed(self, sequence: Sequence) -> None:
        """Nothing more will be announced: load the last, compute what is missing."""
        if not sequence.is_handoff_open:
            return
        sequence.is_handoff_open = False
        if not sequence.is_load_in_flight:
            self._plan_rest(sequence)

    def abandon(self, sequence: Sequence) -> None:
        """The sequence has been taken out of the schedule while it was loading, or before."""
        if sequence.meeting is not None:
            sequence.meeting.stop()
        self.end_handoff(sequence)

    def end_handoff(self, sequence: Sequence) -> None:
        """Let go of what the prefill replica has left in the store for this sequence."""
        if sequence.holds_handoff and self._loader is not None:
            sequence.holds_handoff = False
            self._loader.release(sequence.request_id, sequence.announced_node_id)

    # -- handoff, prefill's side --------------------------------------------------------------------

    def hand_off(self, sequence: Sequence) -> None:
        """Prefill: offer the blocks that have become full since the last time, at the end the tail with them."""
        request = sequence.request
        if request.handoff_owner is None or self._loader is None:
            return
        num_tokens = sequence.num_computed
        is_whole = num_tokens == sequence.num_prompt_tokens
        if not is_whole:
            num_tokens -= num_tokens % self._block_size
        if num_tokens <= max(sequence.offered_tokens, request.handoff_first_block * self._block_size):
            return
        first_block = max(sequence.offered_tokens // self._block_size, request.handoff_first_block)
        sequence.offered_tokens = num_tokens
        offer = StoreOffer(
            request.root_hash,
            tuple(sequence.block_hashes[: num_tokens // self._block_size]),
            sequence.token_ids[:num_tokens].copy(),
            self._block_size,
            self._shape,
            first_block,
            with_tail=is_whole,
            handoff_owner=request.handoff_owner,
            is_transient=not sequence.is_kept,
            origin=request.origin,
        )
        num_computed = sequence.num_prompt_computed

        def is_last(is_stored: bool) -> bool:
            # A refusal ends the work: what can't be handed off is computed by the asker itself.
            return not is_stored or is_whole

        def announce(is_stored: bool) -> None:
            if sequence.status is not Status.FINISHED:
                sequence.listener.on_progress(num_tokens if is_stored else 0, num_computed, is_last(is_stored))

        def finish(is_stored: bool) -> None:
            if sequence.status is not Status.FINISHED and is_last(is_stored):
                self._on_finished(sequence)

        # Announced from the loader's thread: the step loop has begun the next chunk, which takes a while.
        self._store(sequence, offer, finish, announce)

    # -- committing ---------------------------------------------------------------------------------

    def register_full_blocks(self, sequence: Sequence) -> None:
        """Let other sequences find the blocks that have become full."""
        if not sequence.uses_pool or sequence.is_purged:
            return
        for index in range(sequence.num_registered_blocks, sequence.num_chain_tokens // self._block_size):
            self._pool.register(
                sequence.block_table[index],
                sequence.block_hashes[index],
                sequence.parent_hash(index),
                sequence.block_token_ids(index),
                sequence.owner,
            )
            sequence.num_registered_blocks = index + 1

    def commit(self, sequence: Sequence) -> None:
        """The sequence has left the scheduler: keep its blocks. `release_if_idle` gives them back."""
        self.end_handoff(sequence)
        request = sequence.request
        if sequence.is_kept and request.handoff_owner is None and sequence.num_chain_tokens:
            self._register_tail(sequence)
            if self._loader is not None:
                self._store(sequence, self._whole_offer(sequence), self._on_committed)

    def _whole_offer(self, sequence: Sequence) -> StoreOffer:
        """Everything of the sequence that has its chain's KV, the partial block at the end too."""
        token_ids = sequence.token_ids[: sequence.num_chain_tokens].copy()
        request, hashes = sequence.request, sequence.computed_hashes
        return StoreOffer(
            request.root_hash,
            hashes,
            token_ids,
            self._block_size,
            self._shape,
            first_block=0,
            origin=request.origin,
        )

    def offload(self, sequence: Sequence, requeue: Callable[[Sequence], None]) -> bool:
        """A preempted sequence: store its blocks, so that they come back rather than being computed again.

        False if it has nothing that may be stored; then it goes back to waiting at once.
        """
        if self._loader is None or not sequence.is_kept or not sequence.num_chain_tokens:
            return False

        def on_stored(is_stored: bool) -> None:
            if sequence.status is Status.OFFLOADING:
                if sequence.is_kept:
                    self._register_tail(sequence)
                requeue(sequence)

        self._store(sequence, self._whole_offer(sequence), on_stored)
        return True

    def _on_committed(self, is_stored: bool) -> None:
        self._counters["committed_turns" if is_stored else "dropped_turns"] += 1

    def _register_tail(self, sequence: Sequence) -> None:
        index = sequence.num_chain_tokens // self._block_size
        token_ids = sequence.token_ids[index * self._block_size : sequence.num_chain_tokens]
        if len(token_ids):
            parent_hash = sequence.parent_hash(index)
            tail_hash = block_hash(parent_hash, token_ids)
            self._pool.register(sequence.block_table[index], tail_hash, parent_hash, token_ids, sequence.owner)

    def _store(
        self,
        sequence: Sequence,
        offer: StoreOffer,
        on_stored: Callable[[bool], None],
        at_once: Callable[[bool], None] = lambda is_stored: None,
    ) -> None:
        """`at_once` is called by a thread of the loader, `on_stored` then by the step loop between two steps."""
        assert self._loader is not None
        sequence.num_stores_in_flight += 1

        def finish(is_stored: bool) -> None:
            sequence.num_stores_in_flight -= 1
            on_stored(is_stored)
            self.release_if_idle(sequence)

        def on_done(is_stored: bool) -> None:
            at_once(is_stored)
            self._post(lambda: finish(is_stored))

        self._loader.store(StoreJob(offer, tuple(sequence.block_table), on_done))

    def release_if_idle(self, sequence: Sequence) -> None:
        """Give a finished sequence's blocks back, unless a job still uses them: then it does so at its end."""
        if sequence.status is Status.FINISHED and sequence.is_idle and sequence.block_table:
            self._pool.release(sequence.block_table)
            sequence.block_table = []
