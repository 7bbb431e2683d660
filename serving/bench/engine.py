"""`tokenloft bench engine`: prefill and decode through the engine that the server runs.

In one process and in turn: this engine, transformers' `generate` with the same weights and threads, and the
machine's roofline. Nothing is reused: every request's hashes have a root of their own.
"""

import os
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache.hashing import BlockHash, TokenIds, chain_hashes
from serving.bench.report import Figure, Report, differences, interleaved
from serving.bench.roofline import Roofline, prefill_flops
from serving.engine.engine import Engine, EngineConfig
from serving.engine.runner import ModelRunner, quiet_loading
from serving.engine.sequence import EngineRequest, Listener
from serving.protocol import SamplingParams, TokenBatch

BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class EngineBenchOptions:
    """What to measure and how long."""

    model_dir: Path
    num_threads: int
    prefill_tokens: tuple[int, ...] = (1024, 4096)
    decodes: tuple[tuple[int, int], ...] = ((1, 64), (16, 1000))
    """Sequences decoding at once, and the tokens of each one's prompt."""
    decode_tokens: int = 48
    rounds: int = 3
    chunk_tokens: int = 256

    @classmethod
    def of(cls, model_dir: Path, *, num_threads: int | None, is_quick: bool) -> "EngineBenchOptions":
        """The full bench takes about ten minutes on two cores, the quick one about one."""
        num_threads = num_threads or len(os.sched_getaffinity(0))
        if is_quick:
            return cls(model_dir, num_threads, (512,), ((1, 64), (4, 200)), decode_tokens=16, rounds=1)
        return cls(model_dir, num_threads)


def run_engine_bench(options: EngineBenchOptions, progress: Callable[[str], None]) -> Report:
    """Load both sides and measure."""
    progress("loading the engine and transformers")
    return EngineBench(options, progress).run()


class EngineBench:
    """Both sides, loaded once."""

    def __init__(self, options: EngineBenchOptions, progress: Callable[[str], None]) -> None:
        self._options = options
        self._progress = progress
        torch.set_num_threads(options.num_threads)
        runner = ModelRunner(options.model_dir)
        self._vocab_size = runner.vocab_size
        self._bytes_per_token = runner.layout(BLOCK_SIZE).bytes_per_token
        tokenizer: Any = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
        prefills = [num_tokens + 1 for num_tokens in options.prefill_tokens]
        decodes = [count * (size + self._max_tokens(count, size) + BLOCK_SIZE) for count, size in options.decodes]
        config = EngineConfig(
            "decode",
            "bench",
            num_blocks=2 + max(prefills + decodes) // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            step_tokens=options.chunk_tokens,
            num_threads=options.num_threads,
        )
        self._engine = Engine(runner, config, tokenizer)
        with quiet_loading():
            reference: Any = AutoModelForCausalLM.from_pretrained(
                options.model_dir, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
            )
        self._reference = reference.eval()
        self._count = 0

    def run(self) -> Report:
        started = time.perf_counter()
        report = Report("engine")
        self._engine.start()
        try:
            roofline = self._measure("roofline", lambda: Roofline.measure())
            report.figures += [
                Figure("gemm", roofline.gemm_flops_per_s / 1e9, "GFLOP/s"),
                Figure("memory read", roofline.read_bytes_per_s / 1e9, "GB/s"),
            ]
            for num_tokens in self._options.prefill_tokens:
                report.figures += self._measure(
                    f"prefill of {num_tokens} tokens", lambda n=num_tokens: self._prefill(n, roofline)
                )
            for num_sequences, num_tokens in self._options.decodes:
                report.figures += self._measure(
                    f"decode of {num_sequences} sequences of {num_tokens} tokens",
                    lambda n=num_sequences, size=num_tokens: self._decode(n, size, roofline),
                )
        finally:
            self._engine.stop()
        report.seconds = time.perf_counter() - started
        return report

    def _measure(self, what: str, run: Callable[..., Any]) -> Any:
        self._progress(what)
        return run()

    # -- prefill ------------------------------------------------------------------------------------

    def _prefill(self, num_tokens: int, roofline: Roofline) -> list[Figure]:
        prompt = self._prompt(num_tokens)
        speeds = interleaved(
            {
                "engine": lambda: num_tokens / self._ask([prompt], 1).first_token_s,
                "transformers": lambda: num_tokens / self._generate([prompt], 1)[0],
            },
            self._options.rounds,
        )
        flops = prefill_flops(self._reference.config, self._num_parameters(), num_tokens)
        bound = num_tokens / (flops / roofline.gemm_flops_per_s)
        name = f"prefill {num_tokens}"
        return [
            Figure(name, speeds["engine"], "tokens/s", "transformers", speeds["transformers"], 1.2),
            Figure(f"{name}, of the roofline", speeds["engine"], "tokens/s", "gemm roofline", bound, 0.7),
        ]

    def _num_parameters(self) -> int:
        """Parameters outside the embedding and the output head."""
        total = sum(p.numel() for p in self._reference.parameters())
        embedding = self._reference.get_input_embeddings().weight
        head = self._reference.get_output_embeddings().weight
        tied = head.data_ptr() == embedding.data_ptr()
        return int(total - embedding.numel() - (0 if tied else head.numel()))

    # -- decode -------------------------------------------------------------------------------------

    def _decode(self, num_sequences: int, num_tokens: int, roofline: Roofline) -> list[Figure]:
        prompts = [self._prompt(num_tokens) for _ in range(num_sequences)]
        max_tokens = self._max_tokens(num_sequences, num_tokens)
        steps = interleaved(
            {
                "engine": lambda: self._ask(prompts, max_tokens).step_s,
                "transformers": lambda: float(np.median(self._generate(prompts, self._options.decode_tokens)[1:])),
            },
            self._options.rounds,
        )
        bound = self._read_bytes(num_sequences, num_tokens) / roofline.read_bytes_per_s * 1e3
        sequences = "1 sequence" if num_sequences == 1 else f"{num_sequences} sequences"
        name, ours = f"decode step, {sequences} of {num_tokens}", steps["engine"] * 1e3
        return [
            Figure(name, ours, "ms", "transformers", steps["transformers"] * 1e3, 1.0, lower_is_better=True),
            Figure(f"{name}, over reading weights and KV", ours, "ms", "read bound", bound, 1.25, lower_is_better=True),
        ]

    def _max_tokens(self, num_sequences: int, num_tokens: int) -> int:
        """Long enough answers for the first sequence to be there still when the last has decoded for a while."""
        num_prefill_steps = num_sequences * num_tokens // max(1, self._options.chunk_tokens - num_sequences)
        return num_prefill_steps + 2 + self._options.decode_tokens

    def _read_bytes(self, num_sequences: int, num_tokens: int) -> int:
        weights = self._num_parameters() + self._reference.get_output_embeddings().weight.numel()
        return int(4 * weights + num_sequences * num_tokens * self._bytes_per_token)

    # -- the two sides ------------------------------------------------------------------------------

    def _prompt(self, num_tokens: int) -> TokenIds:
        self._count += 1
        rng = np.random.default_rng(self._count)
        return rng.integers(10, self._vocab_size, num_tokens).astype(np.int32)

    def _ask(self, prompts: list[TokenIds], max_tokens: int) -> "_Timing":
        """Send all prompts at once to the engine and wait for all answers."""
        events: queue.Queue[tuple[int, float, TokenBatch]] = queue.Queue()
        started = time.perf_counter()
        for at, prompt in enumerate(prompts):
            self._count += 1
            root = BlockHash(self._count.to_bytes(16, "little"))
            request = EngineRequest(
                f"bench-{self._count}",
                prompt,
                root,
                tuple(chain_hashes(root, prompt, BLOCK_SIZE)),
                SamplingParams(max_tokens, temperature=0.0, ignore_eos=True),
                use_cache=False,
            )
            self._engine.submit(request, _listener(at, events))
        times: list[list[float]] = [[] for _ in prompts]
        num_open = len(prompts)
        while num_open:
            at, when, batch = events.get()
            times[at].append(when - started)
            num_open -= batch.finish_reason is not None
        return _Timing(times)

    def _generate(self, prompts: list[TokenIds], max_tokens: int) -> list[float]:
        """Seconds of each step of `generate` over the batch; the first is the prefill."""
        ids = torch.tensor(np.stack(prompts).astype(np.int64))
        clock = _StepClock()
        clock.times.append(time.perf_counter())
        with torch.inference_mode():
            self._reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                stopping_criteria=[clock],
            )
        return differences(clock.times)


def _listener(at: int, events: "queue.Queue[tuple[int, float, TokenBatch]]") -> Listener:
    return Listener(lambda batch: events.put((at, time.perf_counter(), batch)))


@dataclass(frozen=True, slots=True)
class _Timing:
    """When the tokens of each sequence came, in seconds after the start."""

    times: list[list[float]]

    @property
    def first_token_s(self) -> float:
        return min(times[0] for times in self.times)

    @property
    def step_s(self) -> float:
        """Median time of a step in which every sequence got a token and no prompt was computed."""
        last_to_begin = max(self.times, key=lambda times: times[0])
        first_to_end = min(times[-1] for times in self.times)
        # The first gap may hold the end of a step that computed the last prompt.
        steps = [when for when in last_to_begin[1:] if when <= first_to_end]
        return float(np.median(differences(steps)))


class _StepClock:
    """A stopping criterion that never stops: `generate` calls it after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)
