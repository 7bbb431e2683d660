"""The engine: one model, one pool, one step loop in a thread of its own.

    submit, cancel, handoff_*  ->  inbox  ->  step loop: admit -> plan -> forward -> sample -> listeners
                                                 ^  |
               loader threads, grammar threads --+  +--> load and store jobs (see `transfers`), masks (see `grammar`)

All state belongs to the step loop. Other threads put commands into the inbox, which the loop runs between two
steps; so a cancelled request stops within one step, and nothing needs a lock.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal, ParamSpec, TypeVar

import torch

from cache.messages import PurgeQuery
from serving.engine.block_pool import BlockPool, PoolMatch
from serving.engine.cores import Cores
from serving.engine.detokenizer import IncrementalDetokenizer, Tokenizer
from serving.engine.grammar import BadGrammar, GrammarCompiler, Matcher
from serving.engine.kv_pool import KVPool
from serving.engine.loader import ConnectStore, Loader
from serving.engine.logits import LogitsRow, check_params, ends_answer
from serving.engine.measure import REPORT_INTERVAL_S, Reporter, Speed
from serving.engine.planner import LoadMode, Planner
from serving.engine.pool_memory import PoolMemory, populate
from serving.engine.runner import ModelRunner
from serving.engine.sampler import Sampled, sample
from serving.engine.scheduler import ScheduledPart, Scheduler
from serving.engine.sequence import EngineRequest, Listener, Sequence, Status
from serving.engine.step_batch import SequencePart, build_step_batch
from serving.engine.step_log import StepLog, StepRecord
from serving.engine.transfers import Transfers
from serving.protocol import Logits, TokenBatch

logger = logging.getLogger("tokenloft.engine")

LOOK_INTERVAL_S = 0.02
"""How often an idle step loop looks whether a load is late."""

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine."""

    role: Literal["prefill", "decode"]
    replica_id: str
    num_blocks: int
    block_size: int = 32
    step_tokens: int = 256
    """Most tokens computed in one step."""
    max_running: int = 16
    num_threads: int = 1
    remote_threshold_tokens: int = 256
    """Decode: uncached prompt tokens from which a prefill replica is asked."""
    kv_dtype: str | None = None
    """Dtype of stored KV, one of `KVShape.DTYPES`; None for the engine's own, which keeps every bit."""
    load_plan: LoadMode = "auto"
    """What to do about stored KV: what is ready first, or always the one thing."""
    is_off_chain: bool = False
    """The runner's numerics are other than those of the chains that requests name: see `transfers`.

    What is stored is then always loaded, however slowly: KV computed here could take its place for this answer alone.
    """


class RequestTooLong(ValueError):
    """The request can never fit into the pool."""


class EngineStopped(RuntimeError):
    """The step loop has ended: nothing is computed any more."""


class Engine:
    """See the module's docstring. `start` before the first request, `stop` once at the end."""

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        connect: ConnectStore | None = None,
        cores: Cores | None = None,
    ) -> None:
        """`tokenizer` is needed for sampling, `connect` for anything that goes beyond the pool.

        `cores` are `config.num_threads` of its own unless given.
        """
        self.config = config
        self.counters: Counter[str] = Counter()
        self.steps = StepLog()
        self._cores = cores or Cores(config.num_threads)
        self._runner = runner
        self._tokenizer = tokenizer
        self._grammars = (
            GrammarCompiler(tokenizer, runner.vocab_size, runner.eos_token_ids)
            if tokenizer is not None and config.role == "decode"
            else None
        )
        layout = runner.layout(config.block_size)
        self._flash = runner.flash_mode(config.block_size)
        pool = BlockPool(config.num_blocks, config.block_size)
        self._kv = KVPool(layout, config.num_blocks, runner.device, config.kv_dtype)
        self._memory = PoolMemory(self._kv)
        self._scheduler = Scheduler(pool, config.max_running, config.step_tokens)
        self._speed = Speed(config.step_tokens)
        self._loader = Loader(connect, self._kv) if connect else None
        bytes_per_token = self._kv.stored_shape.bytes_per_token
        load_mode = "load" if config.is_off_chain and config.load_plan == "auto" else config.load_plan
        self._planner = Planner(load_mode, bytes_per_token, config.block_size, self._speed, self._loader)
        self._transfers = Transfers(
            self._loader,
            self._planner,
            pool,
            self._kv.stored_shape,
            self.counters,
            self._post,
            self._conclude,
            config.remote_threshold_tokens,
        )
        self._scheduler.loading_share = self._transfers.share_of_loading
        self._scheduler.offload = lambda sequence: self._transfers.offload(sequence, self._scheduler.requeue)
        self._reporter = (
            Reporter(config.replica_id, config.role, self._scheduler, self._speed, self._loader, self._post)
            if self._loader
            else None
        )
        self._sequences: dict[str, Sequence] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="tokenloft-step-loop", daemon=True)

    def __repr__(self) -> str:
        return f"<Engine {self.config.replica_id} {self._scheduler!r}>"

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def max_request_tokens(self) -> int:
        """Longest prompt and output together."""
        return min(self._runner.max_model_len, self.config.num_blocks * self.config.block_size)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the step loop after its present step, fail what is unfinished, finish the stores that are under way."""
        self._is_stopping = True
        self._post(lambda: None)
        self._thread.join()
        self._cores.close()
        self._memory.close()
        if self._grammars is not None:
            self._grammars.close()
        if self._loader is not None:
            self._loader.close()
            self._loader.forget(self.config.replica_id)

    # -- called from any thread ---------------------------------------------------------------------

    def submit(self, request: EngineRequest, listener: Listener) -> None:
        """Queue a request. Raises RequestTooLong if it can never fit, EngineStopped if the step loop has ended."""
        check_request(request, self.config.block_size, self._runner.vocab_size)
        if request.handoff_owner is not None and self.config.is_off_chain:
            raise ValueError("this engine's KV has other numerics than its chains: it can't be handed off")
        max_new = request.sampling.max_tokens if request.sampling else 0
        num_tokens = len(request.token_ids) + max_new
        if num_tokens > self.max_request_tokens:
            raise RequestTooLong(
                f"prompt and max_tokens are {num_tokens} tokens together, this engine takes {self.max_request_tokens}"
            )
        detokenizer = None
        if request.sampling is not None:
            if self._tokenizer is None:
                raise ValueError("this engine has no tokenizer and can't sample")
            if request.sampling.grammar is not None and self._grammars is None:
                raise ValueError("only decode engines follow grammars")
            params = request.sampling
            detokenizer = IncrementalDetokenizer(self._tokenizer, params.stop, params.min_tokens)
        listener = self._guarded(request.request_id, listener)
        sequence = Sequence(request, listener, self.config.block_size, time.perf_counter(), detokenizer)
        if not self._post(lambda: self._add(sequence)):
            raise EngineStopped(f"the engine {self.config.replica_id} has stopped")

    def _guarded(self, request_id: str, listener: Listener) -> Listener:
        """The listener, which cancels its own request where it would have raised in the step loop."""

        def guard(call: Callable[P, R], otherwise: R) -> Callable[P, R]:
            def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
                try:
                    return call(*args, **kwargs)
                except Exception:  # who listens is gone or broken; the other requests go on
                    logger.exception("the listener of %s failed", request_id)
                    self.cancel(request_id)
                    return otherwise

            return guarded

        ask = listener.ask_prefill
        return Listener(
            guard(listener.on_batch, None),
            guard(listener.on_progress, None),
            guard(listener.on_logits, None),
            guard(ask, False) if ask else None,
        )

    def cancel(self, request_id: str) -> None:
        """Stop a request's work within one step; nothing happens if it is over."""
        self._post(lambda: self._cancel(request_id))

    def handoff_progress(self, request_id: str, num_tokens: int, node_id: str | None) -> None:
        """The prefill replica's blocks up to `num_tokens` can be loaded, from `node_id`'s store if not this node's."""
        self._on_sequence(request_id, lambda s: self._transfers.on_handoff(s, num_tokens, node_id))

    def handoff_logits(self, request_id: str, logits: Logits) -> None:
        """The prefill replica's logits after the prompt: its first token need not wait for the last blocks."""
        self._on_sequence(request_id, lambda s: self._sample_handed_off(s, logits))

    def handoff_closed(self, request_id: str) -> None:
        """Nothing more will come from the prefill replica: what is missing is computed here."""
        self._on_sequence(request_id, self._transfers.on_handoff_closed)

    def purge(self, query: PurgeQuery) -> Future[int]:
        """Forget the pool's blocks that are meant, and keep nothing of the sequences under way that are.

        The future gives the number of blocks, when nothing of it is on its way into the store any more.
        """
        num_blocks: Future[int] = Future()

        def command() -> None:
            for sequence in self._sequences.values():
                sequence.is_purged |= query.means_all_of(*sequence.owner)
            num_purged = self._scheduler.pool.purge(query)
            if self._loader is None:
                num_blocks.set_result(num_purged)
            else:
                self._loader.after_stores(lambda: num_blocks.set_result(num_purged))

        if not self._post(command):
            num_blocks.set_result(0)
        return num_blocks

    def _on_sequence(self, request_id: str, act: Callable[[Sequence], None]) -> None:
        def command() -> None:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                act(sequence)

        self._post(command)

    def stats(self) -> dict[str, float]:
        """Counters since the start and the present load; a snapshot that may be a step old."""
        scheduler = self._scheduler
        return {
            **self.counters,
            "preemptions": scheduler.num_preemptions,
            "num_waiting": len(scheduler.waiting),
            "num_admitted": len(scheduler.admitted),
            "num_used_blocks": scheduler.pool.num_used,
            "num_blocks": self.config.num_blocks,
            "num_threads": self._cores.num_threads,
            "prefill_tokens_per_s": self._speed.prefill_tokens_per_s,
            "decode_step_s": self._speed.decode_step_s,
        }

    def take_memory(self) -> None:
        """Take all of the pool's memory from the machine at once, as it is taken after hours of serving."""
        populate(self._kv, 0, self.config.num_blocks)

    def reset_counters(self) -> None:
        """Start counting anew, between two steps."""
        self._post(self.counters.clear)

    def reset_speed(self) -> None:
        """Start measuring anew, between two steps."""
        self._post(self._speed.reset)

    def check_integrity(self, timeout_s: float = 10.0) -> None:
        """Check the books between two steps. Raises AssertionError if they are off."""
        failures: list[AssertionError] = []
        is_checked = threading.Event()

        def check() -> None:
            try:
                self._scheduler.check_integrity()
            except AssertionError as error:
                failures.append(error)
            is_checked.set()

        self._post(check)
        assert is_checked.wait(timeout_s), "the step loop does not answer"
        for failure in failures:
            raise failure

    def check_alive(self) -> None:
        """Raise EngineStopped if the step loop has ended."""
        if self._is_over:
            raise EngineStopped(f"the engine {self.config.replica_id} has stopped")

    def _post(self, command: Callable[[], None]) -> bool:
        """Have the step loop run a command; False if the loop has ended and never will."""
        with self._wake:
            if self._is_over:
                return False
            self._inbox.append(command)
            self._wake.notify()
            return True

    # -- the step loop ------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the engine is shutting down"
        try:
            while not self._is_stopping:
                self._run_once()
        except Exception:  # a fault of ours: the books may be off, so the engine ends rather than go on
            logger.exception("the step loop of %s has failed", self.config.replica_id)
            reason = "the engine has failed"
        self._end(reason)

    def _run_once(self) -> None:
        self._run_commands()
        self._admit()
        parts = self._scheduler.plan_step()
        self._memory.reach(self._scheduler.pool.high_water)
        if self._reporter is not None:
            self._reporter.report(is_idle=not parts)
        if parts:
            self._cores.begin_step()
            self._step(parts)
        else:
            self._cores.rest()
            self._wait()

    def _end(self, reason: str) -> None:
        """Tell everybody who waits, those still in the inbox too."""
        with self._wake:
            self._is_over = True
        self._cores.rest()
        for act in (self._run_commands, lambda: self._fail_all(reason)):
            try:
                act()
            except Exception:
                logger.exception("%s could not end in order", self.config.replica_id)

    def _fail_all(self, reason: str) -> None:
        for sequence in list(self._sequences.values()):
            self._finish(sequence)
            _tell_failed(sequence, reason, "lost")

    def _wait(self) -> None:
        with self._wake:
            if not self._inbox and not self._is_stopping:
                is_meeting = any(sequence.meeting is not None for sequence in self._scheduler.admitted)
                self._wake.wait(LOOK_INTERVAL_S if is_meeting else REPORT_INTERVAL_S)

    def _run_commands(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _add(self, sequence: Sequence) -> None:
        if sequence.request_id in self._sequences:
            _tell_failed(sequence, f"request id {sequence.request_id} is in use")
            return
        self._sequences[sequence.request_id] = sequence
        self.counters["requests"] += 1
        params = sequence.request.sampling
        if params is None or params.grammar is None:
            self._scheduler.add(sequence)
            return
        assert self._grammars is not None
        sequence.status = Status.COMPILING
        opened = self._grammars.open(params.grammar, sequence.request.generated)
        opened.add_done_callback(lambda done: self._post(lambda: self._add_with_grammar(sequence, done)))

    def _add_with_grammar(self, sequence: Sequence, opened: Future[Matcher]) -> None:
        if sequence.status is not Status.COMPILING:
            return  # cancelled meanwhile
        try:
            sequence.matcher = opened.result()
        except BadGrammar as error:
            self._fail(sequence, f"its grammar is of no use: {error}")
            return
        sequence.status = Status.WAITING
        self._scheduler.add(sequence)

    def _admit(self) -> None:
        while (admission := self._scheduler.admit()) is not None:
            sequence, match = admission
            self._copy_partial(sequence, match)
            self._transfers.begin(sequence)

    def _copy_partial(self, sequence: Sequence, match: PoolMatch) -> None:
        if match.partial_block_id is None:
            return
        block_size = self.config.block_size
        target = sequence.block_table[len(match.block_ids)]
        self._kv.copy_rows(match.partial_block_id * block_size, target * block_size, match.partial_tokens)

    def _step(self, parts: list[ScheduledPart]) -> None:
        began_at = time.monotonic()
        try:
            computed = self._forward(parts)
        except Exception as error:  # whatever the model raises must not end the loop
            logger.exception("a step failed")
            for part in parts:
                self._fail(part.sequence, f"the model failed: {error}")
            return
        step = StepRecord(began_at, time.monotonic(), len(parts), sum(part.num_tokens for part in parts))
        self._speed.note(parts, step.seconds)
        self.steps.note(step)
        self.counters["steps"] += 1
        for part, next_token in computed:
            self._advance(part, next_token)

    def _forward(self, parts: list[ScheduledPart]) -> list[tuple[ScheduledPart, Sampled | None]]:
        """Compute the parts; the next token of each whose last token was computed, None for the others.

        A part whose next token can't be chosen yet, as its mask is late, is left out: it is computed again.
        """
        batch = build_step_batch(self._kv, [_sequence_part(part) for part in parts], self._flash)
        logits = self._pass_on(self._runner.forward(batch), parts)
        wanting = [part for part in parts if _wants_token(part)]
        matchers = [part.sequence.matcher for part in wanting if part.sequence.matcher is not None]
        Matcher.wait(matchers, has_others=len(matchers) < len(parts))
        late = {part.sequence.request_id for part in wanting if not _can_choose(part.sequence)}
        if late:
            logits = logits[[part.sequence.request_id not in late for part in wanting]]
        computed = [part for part in parts if part.sequence.request_id not in late]
        rows = [_logits_row(part.sequence, self._runner.eos_token_ids) for part in computed if _wants_token(part)]
        tokens = iter(sample(logits, rows) if rows else ())
        return [(part, next(tokens) if _wants_token(part) else None) for part in computed]

    def _pass_on(self, logits: torch.Tensor, parts: list[ScheduledPart]) -> torch.Tensor:
        """Give those that are not sampled from here to whoever waits for them, and return the others."""
        wanting = [part for part in parts if _wants_logits(part)]
        is_sampled = [_wants_token(part) for part in wanting]
        if all(is_sampled):
            return logits
        for part, row in zip(wanting, logits, strict=True):
            if not _wants_token(part):
                part.sequence.listener.on_logits(row.to("cpu", torch.float32, copy=True).numpy())
        return logits[is_sampled]

    def _sample_handed_off(self, sequence: Sequence, logits: Logits) -> None:
        """Begin the answer. The blocks that it goes on behind may still be on their way."""
        if not sequence.is_handoff_open or sequence.num_output_tokens or not _can_choose(sequence):
            return  # too late, or too early: then the last token is computed here as well
        began_at = time.monotonic()
        row = _logits_row(sequence, self._runner.eos_token_ids)
        try:
            (sampled,) = sample(torch.tensor(logits).unsqueeze(0), [row])  # a copy: what Ray gives can't be written to
        except Exception as error:  # as in a step
            logger.exception("handed-off logits can't be sampled from")
            self._fail(sequence, f"the model failed: {error}")
            return
        self.steps.note(StepRecord(began_at, time.monotonic(), num_sequences=1, num_tokens=0))
        self._emit(sequence, sampled)

    def _advance(self, part: ScheduledPart, sampled: Sampled | None) -> None:
        sequence = part.sequence
        num_prompt = max(0, min(part.num_tokens, sequence.num_prompt_tokens - sequence.num_computed))
        if self.config.is_off_chain and sequence.off_chain_from is None:
            sequence.off_chain_from = sequence.num_computed
        sequence.num_computed += part.num_tokens
        sequence.num_prompt_computed += sequence.account()
        self.counters["computed_tokens"] += part.num_tokens
        self.counters["computed_prompt_tokens"] += num_prompt
        self._transfers.on_computed(sequence)
        if sampled is not None:
            self._emit(sequence, sampled)

    def _emit(self, sequence: Sequence, sampled: Sampled) -> None:
        params, token_id = sequence.request.sampling, sampled.token_id
        assert sequence.detokenizer is not None
        assert params is not None
        matcher = sequence.matcher
        if matcher is not None:
            matcher.accept(token_id)
            if matcher.error is not None:
                self._fail(sequence, f"its grammar is of no use: {matcher.error}")
                return
        sequence.append(token_id)
        if sequence.first_token_at is None:
            sequence.first_token_at = time.perf_counter()
        self.counters["generated_tokens"] += 1
        text, is_stopped = "", ends_answer(token_id, params, self._runner.eos_token_ids)
        if not is_stopped:
            text, is_stopped = sequence.detokenizer.push(token_id)
            is_stopped = is_stopped or (matcher is not None and matcher.is_complete)
        logprobs = (sampled.logprob,) if sampled.logprob is not None else ()
        if not is_stopped and sequence.num_output_tokens < params.max_tokens:
            sequence.listener.on_batch(TokenBatch((token_id,), text, logprobs=logprobs))
            return
        text += sequence.detokenizer.finish()
        reason = "stop" if is_stopped else "length"
        sequence.last_batch = TokenBatch((token_id,), text, reason, logprobs=logprobs)
        if sequence.status is not Status.LOADING:  # else what is loaded is kept as well
            self._conclude(sequence)

    # -- the end of a sequence ----------------------------------------------------------------------

    def _conclude(self, sequence: Sequence) -> None:
        """All that was asked for is done."""
        self._finish(sequence)
        if sequence.last_batch is not None:
            if sequence.num_output_tokens == 1:
                sequence.first_token_at = time.perf_counter()  # it may have waited for its prompt's KV
            sequence.listener.on_batch(replace(sequence.last_batch, usage=sequence.usage()))

    def _finish(self, sequence: Sequence) -> None:
        """Take the sequence out of the schedule, keep what it has computed."""
        was_running = sequence.status is Status.RUNNING
        del self._sequences[sequence.request_id]
        if sequence.status is Status.COMPILING:
            sequence.status = Status.FINISHED
        else:
            self._scheduler.remove(sequence)
        if was_running:
            self._transfers.commit(sequence)
        else:
            self._transfers.abandon(sequence)
        self._transfers.release_if_idle(sequence)

    def _cancel(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.counters["cancelled"] += 1
            self._finish(sequence)

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self._finish(sequence)
        _tell_failed(sequence, reason)


def _tell_failed(sequence: Sequence, reason: str, finish_reason: str = "error") -> None:
    sequence.listener.on_batch(TokenBatch((), reason, finish_reason, sequence.usage()))
    sequence.listener.on_progress(0, sequence.num_prompt_computed, True)


def check_request(request: EngineRequest, block_size: int, vocab_size: int) -> None:
    """Raise ValueError for a request that could never be finished."""
    if not len(request.token_ids):
        raise ValueError(f"request {request.request_id} has no tokens")
    if request.token_ids.min() < 0 or request.token_ids.max() >= vocab_size:
        raise ValueError(f"request {request.request_id} has token ids that are not from 0 to {vocab_size - 1}")
    if request.sampling is not None:
        check_params(request.sampling, vocab_size)
    elif request.handoff_owner is None:
        raise ValueError(f"request {request.request_id} neither samples nor hands off")
    elif len(request.token_ids) <= request.handoff_first_block * block_size:
        raise ValueError(f"request {request.request_id} has nothing to hand off")


def _wants_logits(part: ScheduledPart) -> bool:
    """Whether the step computes the sequence's last known token, and the logits after it are needed."""
    return part.sequence.needs_logits and part.num_tokens == part.sequence.num_uncomputed


def _wants_token(part: ScheduledPart) -> bool:
    """Whether the next token is to be sampled from them here."""
    return part.sequence.request.sampling is not None and _wants_logits(part)


def _logits_row(sequence: Sequence, eos_token_ids: frozenset[int]) -> LogitsRow:
    assert sequence.request.sampling is not None
    allowed = None if sequence.matcher is None else sequence.matcher.mask
    return LogitsRow(sequence.request.sampling, sequence.token_ids, sequence.num_prompt_tokens, eos_token_ids, allowed)


def _can_choose(sequence: Sequence) -> bool:
    return sequence.matcher is None or sequence.matcher.is_ready


def _sequence_part(part: ScheduledPart) -> SequencePart:
    sequence = part.sequence
    start = sequence.num_computed
    token_ids = sequence.token_ids[start : start + part.num_tokens]
    return SequencePart(token_ids, start, sequence.block_table, wants_logits=_wants_logits(part))
