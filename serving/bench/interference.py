"""What prefill and decode cost each other on one machine: part of `tokenloft bench handoff`.

    the server, one thread each      long prompts alone | running streams beside long prompts
    two bare engines                                    | the same: what any two engines would cost each other
    one combined replica                                | the same: streams wait for every chunk of a prompt
    the server, taking idle cores    long prompts alone | running streams beside long prompts

Long prompts come one after the other and share nothing. A stream's gap is the time between two steps in which all
streams got a token, by the engine's own log.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from cache.hashing import TokenIds
from serving.bench.bare import BLOCK_SIZE, BareEngine, bare_engine
from serving.bench.report import Figure, differences
from serving.bench.stage import ONE_THREAD_EACH, Role, Server, Stage, draw_prompt, wait_until_still
from serving.engine.step_log import StepRecord

COMBINED = ("prefill.replicas=0",)
CHUNK_TOKENS = 256
"""Of all engines here, as is the default."""
SETTLE_S = 1.0
"""Streams decode alone for so long before the first long prompt."""
P99 = 0.99
MAX_ANSWER_TOKENS = 4000
"""Of a stream: it is cancelled long before."""
BEGIN_TIMEOUT_S = 120.0
_ENGINES = ("ServeReplica:tokenloft:prefill", "ServeReplica:tokenloft:decode")


@dataclass(frozen=True, slots=True)
class InterferenceOptions:
    """What to measure and how long."""

    model_dir: Path
    prompt_tokens: int = 8000
    idle_prompt_tokens: int = 2000
    """Where idle cores are taken."""
    num_streams: int = 4
    stream_tokens: int = 512
    """Of each stream's prompt."""
    rounds: int = 1
    """A long prompt is some thirty steps of prefill and hundreds of decode: one says a lot."""

    @classmethod
    def quick(cls, model_dir: Path) -> "InterferenceOptions":
        return cls(model_dir, prompt_tokens=1500, idle_prompt_tokens=1500)


@dataclass
class Beside:
    """Steps of both sides while long prompts were computed, round after round."""

    num_streams: int
    decode: list[list[StepRecord]] = field(default_factory=list)
    prefill: list[list[StepRecord]] = field(default_factory=list)
    other_cores: list[float] = field(default_factory=list)
    """Cores that everything but the two engines' processes took meanwhile."""

    def add(self, decode: Sequence[StepRecord], prefill: Sequence[StepRecord]) -> None:
        """One round: decode's steps count from prefill's first until its last."""
        first, last = prefill[0].began_at, prefill[-1].ended_at
        self.decode.append([step for step in decode if step.began_at >= first and step.ended_at <= last])
        self.prefill.append(list(prefill))

    @property
    def step_s(self) -> list[float]:
        """Of the steps that only decoded all the streams."""
        return [step.seconds for steps in self.decode for step in steps if self._is_usual(step)]

    @property
    def gap_s(self) -> list[float]:
        """Between steps that gave all streams a token."""
        ended = [[step.ended_at for step in steps if step.num_sequences >= self.num_streams] for steps in self.decode]
        return [gap for times in ended for gap in differences(times)]

    @property
    def prefill_tokens_per_s(self) -> float:
        return statistics.median(map(tokens_per_s, self.prefill))

    def _is_usual(self, step: StepRecord) -> bool:
        return step.is_decode and step.num_sequences == self.num_streams


def tokens_per_s(steps: Sequence[StepRecord]) -> float:
    """Speed of a prompt's prefill, what happens between its steps included."""
    return sum(step.num_tokens for step in steps) / (steps[-1].ended_at - steps[0].began_at)


def p99(values: Sequence[float]) -> float:
    return float(np.quantile(values, P99))


def measure_interference(stage: Stage, options: InterferenceOptions, progress: Callable[[str], None]) -> list[Figure]:
    """All of the module's docstring. What is compared step by step is measured in turn."""
    bench = _Bench(options, progress)
    with ExitStack() as opened:
        engines = bench.open_bare(opened)
        return [*_one_thread_each(stage, bench, engines, options), *_taking_idle_cores(stage, bench, engines, options)]


Engines = tuple[BareEngine, BareEngine]
"""One to decode, one to prefill."""


def _one_thread_each(stage: Stage, bench: "_Bench", engines: Engines, options: InterferenceOptions) -> list[Figure]:
    ours, bare, alone = Beside(options.num_streams), Beside(options.num_streams), list[float]()
    with stage.serving(*ONE_THREAD_EACH) as server:
        for _ in range(options.rounds):
            alone.append(bench.alone(server, options.prompt_tokens))
            bench.beside(server, "prefill", options.prompt_tokens, ours)
            bench.beside_bare(*engines, options.prompt_tokens, bare)
    combined = Beside(options.num_streams)
    with stage.serving(*COMBINED) as server:
        bench.beside(server, "decode", options.prompt_tokens, combined)
    speed, best = ours.prefill_tokens_per_s, statistics.median(alone)
    return [
        Figure("prefill beside streams", speed, "tokens/s", "alone, one thread", best, 0.9),
        Figure("prefill of bare engines beside each other", bare.prefill_tokens_per_s, "tokens/s", "alone", best),
        Figure("cores that all but the two engines took meanwhile", statistics.median(ours.other_cores), "cores"),
        *_steps_beside("decode step beside prefill", ours, bare),
        _gap(ours, combined),
    ]


def _taking_idle_cores(stage: Stage, bench: "_Bench", engines: Engines, options: InterferenceOptions) -> list[Figure]:
    """The server as it is by default: each side has its share, and what the other leaves."""
    one, more = list[float](), list[float]()
    ours, bare = Beside(options.num_streams), Beside(options.num_streams)
    with stage.serving() as server:
        for _ in range(options.rounds):
            one.append(bench.alone_bare(engines[1], options.idle_prompt_tokens))
            more.append(bench.alone(server, options.idle_prompt_tokens))
            bench.beside(server, "prefill", options.idle_prompt_tokens, ours)
            bench.beside_bare(*engines, options.idle_prompt_tokens, bare)
    return [
        Figure(
            "prefill alone, taking idle cores",
            statistics.median(more),
            "tokens/s",
            "a bare engine, one thread",
            statistics.median(one),
        ),
        *_steps_beside("decode step beside prefill, taking idle cores", ours, bare),
    ]


class _Bench:
    """Runs one thing at a time."""

    def __init__(self, options: InterferenceOptions, progress: Callable[[str], None]) -> None:
        self._options = options
        self._progress = progress
        self._seeds = itertools.count(1000)
        self._answer_tokens = MAX_ANSWER_TOKENS

    def open_bare(self, opened: ExitStack) -> tuple[BareEngine, BareEngine]:
        """One to decode, one to prefill."""
        self._progress("two bare engines")
        options = self._options
        for_streams = options.num_streams * (options.stream_tokens + self._answer_tokens)
        sizes = (for_streams, options.prompt_tokens + 1)
        decode, prefill = (
            opened.enter_context(bare_engine(options.model_dir, 1 + size // BLOCK_SIZE, CHUNK_TOKENS)) for size in sizes
        )
        return decode, prefill

    def alone(self, server: Server, num_tokens: int) -> float:
        """Tokens per second of one long prompt."""
        self._progress("a long prompt alone")
        began_at = time.monotonic()
        server.complete(self._long_prompt(num_tokens), 1)
        return tokens_per_s(_prefills(server.steps("prefill", began_at)))

    def alone_bare(self, prefill: BareEngine, num_tokens: int) -> float:
        self._progress("a long prompt alone, bare engine")
        began_at = time.monotonic()
        prefill.prefill(self._long_prompt(num_tokens))
        return tokens_per_s(_prefills(prefill.steps(began_at)))

    def beside(self, server: Server, prefill_role: Role, num_tokens: int, found: Beside) -> None:
        """One long prompt beside running streams."""
        self._progress("a long prompt beside streams")
        with _streams(server, self._stream_prompts(), self._answer_tokens):
            time.sleep(SETTLE_S)
            began_at, before = time.monotonic(), _other_cpu_s()
            server.complete(self._long_prompt(num_tokens), 1)
            found.other_cores.append((_other_cpu_s() - before) / (time.monotonic() - began_at))
            decode, prefill = server.steps("decode", began_at), server.steps(prefill_role, began_at)
        found.add(decode, _prefills(prefill))
        wait_until_still(server, "decode")

    def beside_bare(self, decode: BareEngine, prefill: BareEngine, num_tokens: int, found: Beside) -> None:
        self._progress("a long prompt beside streams, bare engines")
        decode.begin_streams(self._stream_prompts(), self._answer_tokens)
        time.sleep(SETTLE_S)
        began_at = time.monotonic()
        prefill.prefill(self._long_prompt(num_tokens))
        found.add(decode.steps(began_at), _prefills(prefill.steps(began_at)))
        decode.end_streams()

    def _long_prompt(self, num_tokens: int) -> TokenIds:
        return draw_prompt(num_tokens, next(self._seeds))

    def _stream_prompts(self) -> list[TokenIds]:
        return [draw_prompt(self._options.stream_tokens, next(self._seeds)) for _ in range(self._options.num_streams)]


def _prefills(steps: Sequence[StepRecord]) -> list[StepRecord]:
    return [step for step in steps if not step.is_decode]


def _other_cpu_s() -> float:
    """CPU seconds of all processes so far but those of prefill and decode replicas, which Ray gives such titles."""
    total = 0.0
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended meanwhile
            if not any(title in process.name() or title in "".join(process.cmdline()[:1]) for title in _ENGINES):
                total += sum(process.cpu_times()[:2])
    return total


@contextmanager
def _streams(server: Server, prompts: Sequence[TokenIds], max_tokens: int) -> Iterator[None]:
    """Answers that are streamed while the block runs, all of them begun before it does."""
    stop = threading.Event()
    begun = [threading.Event() for _ in prompts]

    def read(prompt: TokenIds, has_begun: threading.Event) -> None:
        with server.streaming(prompt, max_tokens) as chunks:
            for _ in chunks:
                has_begun.set()
                if stop.is_set():
                    return

    with ThreadPoolExecutor(len(prompts)) as pool:
        reading = [pool.submit(read, prompt, event) for prompt, event in zip(prompts, begun, strict=True)]
        try:
            if not all(event.wait(BEGIN_TIMEOUT_S) for event in begun):
                raise TimeoutError("the streams did not begin")
            yield
            for each in reading:
                if each.done():
                    each.result()
                    raise ValueError("a stream ended before the long prompt: it was too short")
        finally:
            stop.set()


def _steps_beside(name: str, ours: Beside, bare: Beside) -> list[Figure]:
    median_s, bare_median_s = statistics.median(ours.step_s), statistics.median(bare.step_s)
    p99_s, bare_p99_s = p99(ours.step_s), p99(bare.step_s)
    against = "two bare engines"
    return [
        Figure(f"{name}, median", median_s * 1e3, "ms", against, bare_median_s * 1e3, 1.1, lower_is_better=True),
        Figure(f"{name}, p99", p99_s * 1e3, "ms", against, bare_p99_s * 1e3, 1.3, lower_is_better=True),
    ]


def _gap(ours: Beside, combined: Beside) -> Figure:
    return Figure(
        "p99 gap of a stream beside prefill",
        p99(ours.gap_s) * 1e3,
        "ms",
        "one combined replica",
        p99(combined.gap_s) * 1e3,
        0.2,
        lower_is_better=True,
    )
