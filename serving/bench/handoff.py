"""`tokenloft bench handoff`: from prefill to decode, and what the two cost each other, on a running server.

A cold prompt goes through the whole server, HTTP, gateway, decode and prefill replicas. When prefill ended its last
step, and when decode sampled the first two tokens, is read from the engines' own logs of steps.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serving.bench.interference import InterferenceOptions, measure_interference
from serving.bench.report import Figure, Report, differences
from serving.bench.stage import ONE_THREAD_EACH, Server, draw_prompt, open_stage
from serving.engine.step_log import StepRecord
from serving.model_files import ModelFiles


@dataclass(frozen=True, slots=True)
class HandoffBenchOptions:
    """What to measure and how long."""

    model: ModelFiles
    interference: InterferenceOptions
    prompt_tokens: tuple[int, ...] = (1024, 2048)
    answer_tokens: int = 24
    rounds: int = 3

    @classmethod
    def of(cls, model: ModelFiles, *, is_quick: bool) -> "HandoffBenchOptions":
        """The full bench takes about eight minutes on two cores, the quick one about three."""
        if is_quick:
            return cls(model, InterferenceOptions.quick(model.directory), (1024,), answer_tokens=12, rounds=2)
        return cls(model, InterferenceOptions(model.directory))


@dataclass(frozen=True, slots=True)
class Timing:
    """One prompt's way from prefill to decode, in seconds."""

    to_first_token_s: float
    """From the end of prefill's last step until the first token was sampled."""
    to_second_token_s: float
    """From the first token to the second."""
    gap_s: float
    """Median gap between later tokens."""
    step_s: float
    """Median decode step."""

    @classmethod
    def of(cls, prefill: Sequence[StepRecord], decode: Sequence[StepRecord]) -> "Timing":
        """From the steps that both engines made for one prompt. Raises ValueError if they are not such steps."""
        if not prefill or len(decode) < 4:
            raise ValueError(f"{len(prefill)} steps of prefill and {len(decode)} of decode are too few")
        if decode[0].num_tokens or not all(step.is_decode for step in decode[1:]):
            raise ValueError("decode has computed a part of the prompt itself")
        gaps = differences([step.ended_at for step in decode])
        return cls(
            decode[0].ended_at - prefill[-1].ended_at,
            gaps[0],
            statistics.median(gaps[1:]),
            statistics.median(step.seconds for step in decode[1:]),
        )


def run_handoff_bench(options: HandoffBenchOptions, progress: Callable[[str], None]) -> Report:
    """Bring the servers up one after the other and measure."""
    started = time.perf_counter()
    report = Report("handoff")
    with open_stage(options.model, progress) as stage:
        progress("a server with one thread each for prefill and decode")
        with stage.serving(*ONE_THREAD_EACH) as server:
            for num_tokens in options.prompt_tokens:
                progress(f"handoff of {num_tokens:,} tokens")
                report.figures += _handoff(server, num_tokens, options)
        report.figures += measure_interference(stage, options.interference, progress)
    report.seconds = time.perf_counter() - started
    return report


def _handoff(server: Server, num_tokens: int, options: HandoffBenchOptions) -> list[Figure]:
    timings = [_one(server, num_tokens, options.answer_tokens, seed) for seed in range(options.rounds)]
    first_s, second_s, gap_s, step_s = (
        statistics.median(values)
        for values in zip(*((t.to_first_token_s, t.to_second_token_s, t.gap_s, t.step_s) for t in timings), strict=True)
    )
    name = f"{num_tokens} tokens, prefill's last step to"
    return [
        Figure(f"{name} the first token", first_s * 1e3, "ms", "decode step", step_s * 1e3, 1.5, lower_is_better=True),
        Figure(
            f"{num_tokens} tokens, first token to the second",
            second_s * 1e3,
            "ms",
            "usual gap",
            gap_s * 1e3,
            2.0,
            lower_is_better=True,
        ),
        _computed(server, num_tokens),
    ]


def _one(server: Server, num_tokens: int, answer_tokens: int, seed: int) -> Timing:
    began_at = time.monotonic()
    server.complete(draw_prompt(num_tokens, seed), answer_tokens)
    return Timing.of(server.steps("prefill", began_at), server.steps("decode", began_at))


def _computed(server: Server, num_tokens: int) -> Figure:
    """Prompt tokens that both engines compute for one more prompt of which nothing is stored."""

    def total() -> int:
        return sum(int(server.counters(role)["computed_prompt_tokens"]) for role in ("prefill", "decode"))

    before = total()
    server.complete(draw_prompt(num_tokens, seed=-num_tokens), 1)
    computed = total() - before
    return Figure(
        f"{num_tokens} tokens, computed", computed, "tokens", "uncached", num_tokens, 1.0, lower_is_better=True
    )
