"""`tokenloft bench weights`: what decoding with smaller weights takes, gives, and does to the answers.

One engine for each kind of weights and number of threads, all in one process and asked in turn. The effect on the
answers is that of a decode replica beside a float32 prefill replica: the KV of real text is computed in float32, and
each kind reads on in the same text over it, its own KV behind. What is counted is whether the most likely next token is
another one at each position; the text goes on as it is written.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoTokenizer

from cache.hashing import TokenIds
from serving.bench.report import Figure, Report, interleaved
from serving.bench.storage_dtypes import BLOCK_SIZE, LogitsEffect, compute_prompt, logits_after, manual_texts
from serving.bench.turns import ask, random_tokens
from serving.engine.engine import Engine, EngineConfig
from serving.engine.kv_pool import KVPool
from serving.engine.linear import Weights
from serving.engine.runner import ModelRunner, set_num_threads

KINDS: tuple[Weights, ...] = get_args(Weights)
EXACT: Weights = "float32"


@dataclass(frozen=True, slots=True)
class WeightsBenchOptions:
    """What to measure and how long."""

    model_dir: Path
    num_threads: tuple[int, ...] = (1, 2)
    num_sequences: tuple[int, ...] = (1, 16)
    prompt_tokens: int = 64
    decode_tokens: int = 32
    rounds: int = 5
    num_texts: int = 4
    text_tokens: int = 1024
    """Whose KV is float32's."""
    continued_tokens: int = 256

    @classmethod
    def of(cls, model_dir: Path, *, is_quick: bool) -> "WeightsBenchOptions":
        """The full bench takes about five minutes on two cores, the quick one about one."""
        num_threads = (1, 2) if len(os.sched_getaffinity(0)) > 1 else (1,)
        if is_quick:
            return cls(model_dir, num_threads, decode_tokens=16, rounds=1, num_texts=1, continued_tokens=64)
        return cls(model_dir, num_threads)


def run_weights_bench(options: WeightsBenchOptions, progress: Callable[[str], None]) -> Report:
    """Load the model three times and measure. ValueError if the texts are too short for the options."""
    started = time.perf_counter()
    progress("loading the model with each kind of weights")
    texts = manual_texts(options.model_dir, options.num_texts, options.text_tokens + options.continued_tokens)
    runners = {kind: ModelRunner(options.model_dir, weights=kind) for kind in KINDS}
    report = Report("weights")
    report.figures += [_size(kind, runners) for kind in KINDS]
    report.figures += _steps(options, runners, progress)
    report.figures += _effects(options, runners, texts, progress)
    report.seconds = time.perf_counter() - started
    return report


def _size(kind: Weights, runners: dict[Weights, ModelRunner]) -> Figure:
    megabytes = {name: runner.num_weight_bytes / 1e6 for name, runner in runners.items()}
    return Figure(f"{kind}: weights", megabytes[kind], "MB", EXACT, megabytes[EXACT], lower_is_better=True)


# -- speed ------------------------------------------------------------------------------------------


def _steps(
    options: WeightsBenchOptions, runners: dict[Weights, ModelRunner], progress: Callable[[str], None]
) -> list[Figure]:
    """Milliseconds of a decode step, for each number of threads and of sequences."""
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
    figures: list[Figure] = []
    for num_threads in options.num_threads:
        for num_sequences in options.num_sequences:
            name = f"decode step, {_count(num_sequences, 'sequence')}, {_count(num_threads, 'thread')}"
            progress(name)
            with _engines(options, runners, num_threads, tokenizer) as engines:
                seconds = interleaved(
                    {
                        kind: _timed_step(options, engine, runners[kind].vocab_size, num_sequences)
                        for kind, engine in engines.items()
                    },
                    options.rounds,
                )
            figures += [
                Figure(f"{kind}: {name}", seconds[kind] * 1e3, "ms", EXACT, seconds[EXACT] * 1e3, lower_is_better=True)
                for kind in KINDS
            ]
    return figures


@contextmanager
def _engines(
    options: WeightsBenchOptions, runners: dict[Weights, ModelRunner], num_threads: int, tokenizer: Any
) -> Iterator[dict[Weights, Engine]]:
    """An engine of each kind, running. Its step loop has its threads, and it computes only when it is asked."""
    most = max(options.num_sequences)
    num_blocks = most * -(-(options.prompt_tokens + _max_tokens(options)) // BLOCK_SIZE)
    engines: dict[Weights, Engine] = {}
    with ExitStack() as opened:
        for kind, runner in runners.items():
            config = EngineConfig(
                "decode", kind, num_blocks, BLOCK_SIZE, step_tokens=256, max_running=most, num_threads=num_threads
            )
            engines[kind] = opened.enter_context(Engine(runner, config, tokenizer))
        yield engines


def _timed_step(
    options: WeightsBenchOptions, engine: Engine, vocab_size: int, num_sequences: int
) -> Callable[[], float]:
    def run() -> float:
        prompts = [random_tokens(options.prompt_tokens, vocab_size) for _ in range(num_sequences)]
        return ask(engine, prompts, _max_tokens(options)).step_s

    return run


def _max_tokens(options: WeightsBenchOptions) -> int:
    """Long enough answers for all sequences to decode together for a while."""
    num_prompt_steps = max(options.num_sequences) * options.prompt_tokens // 240
    return options.decode_tokens + num_prompt_steps + 2


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# -- effect on the answers --------------------------------------------------------------------------


def _effects(
    options: WeightsBenchOptions,
    runners: dict[Weights, ModelRunner],
    texts: list[TokenIds],
    progress: Callable[[str], None],
) -> list[Figure]:
    before = torch.get_num_threads()
    set_num_threads(max(options.num_threads))
    try:
        logits = _logits(options.text_tokens, runners, texts, progress)
    finally:
        set_num_threads(before)
    figures: list[Figure] = []
    for kind in KINDS:
        effect = LogitsEffect.between(logits[EXACT], logits[kind])
        figures += [
            Figure(f"{kind}: greedy tokens that change", effect.changed_share * 100, "%", lower_is_better=True),
            Figure(f"{kind}: KL divergence", effect.mean_kl, "nats", lower_is_better=True),
            Figure(f"{kind}: mean change of a logit", effect.mean_abs_diff, "", lower_is_better=True),
        ]
    return figures


def _logits(
    num_tokens: int,
    runners: dict[Weights, ModelRunner],
    texts: list[TokenIds],
    progress: Callable[[str], None],
) -> dict[Weights, torch.Tensor]:
    """Logits of each kind at all positions behind the first `num_tokens` tokens of all texts."""
    exact = runners[EXACT]
    found: dict[Weights, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for number, text in enumerate(texts, 1):
        progress(f"reading on behind {num_tokens} tokens, text {number} of {len(texts)}")
        pool, table = _pool_for(exact, text)
        compute_prompt(exact, pool, text[:num_tokens], table)
        for kind, runner in runners.items():
            # Each writes its KV over the last one's, behind the prompt's.
            found[kind].append(logits_after(runner, pool, text, num_tokens, table))
    return {kind: torch.cat(logits) for kind, logits in found.items()}


def _pool_for(runner: ModelRunner, text: TokenIds) -> tuple[KVPool, range]:
    table = range(-(-len(text) // BLOCK_SIZE))
    return KVPool(runner.layout(BLOCK_SIZE), len(table), runner.device), table
