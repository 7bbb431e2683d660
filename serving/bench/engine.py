"""`tokenloft bench engine`: prefill and decode through the engine that the server runs.

In turn: this engine, transformers' `generate` with the same weights and threads, other engines where they are installed
(see `peers`), and the machine's roofline. Nothing is reused: every request's hashes have a root of their own. Then,
with a node store, what a returning turn takes (see `warm_turn`) and what the cache costs where nothing returns (see
`cache_cost`).

As in a replica, the engine's step loop is the only thread of its process that computes with more than one thread.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cache.hashing import TokenIds
from serving.bench.cache_cost import CacheCostOptions, measure_cache_cost
from serving.bench.peers.peer import NO_PEERS, TRANSFORMERS, VLLM, Peer, PeerOptions, open_peers
from serving.bench.report import Figure, Report, interleaved
from serving.bench.roofline import Roofline, prefill_flops
from serving.bench.turns import Timing, ask, random_tokens
from serving.bench.warm_turn import WarmTurnOptions, measure_warm_turns
from serving.engine.engine import Engine, EngineConfig
from serving.engine.runner import ModelRunner, set_num_threads

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
    prefix_tokens: int = 4096
    """Of a warm turn."""
    new_prompt_tokens: int = 1024
    """Of the prompts that are kept and never come again."""
    folder: Path | None = None
    """On the disk that the warm turn reads; None: where temporary files go."""
    peers: PeerOptions = NO_PEERS

    @classmethod
    def of(
        cls,
        model_dir: Path,
        *,
        num_threads: int | None,
        is_quick: bool,
        folder: Path | None = None,
        peers: PeerOptions = NO_PEERS,
    ) -> "EngineBenchOptions":
        """The full bench takes about a quarter of an hour on two cores, the quick one about one minute."""
        options = cls(model_dir, num_threads or len(os.sched_getaffinity(0)), folder=folder, peers=peers)
        if not is_quick:
            return options
        return replace(
            options,
            prefill_tokens=(512,),
            decodes=((1, 64), (4, 200)),
            decode_tokens=16,
            rounds=1,
            prefix_tokens=1024,
            new_prompt_tokens=128,
        )

    def max_tokens(self, num_sequences: int, num_tokens: int) -> int:
        """Long enough answers for the first sequence to be there still when the last has decoded for a while."""
        num_prefill_steps = num_sequences * num_tokens // max(1, self.chunk_tokens - num_sequences)
        return num_prefill_steps + 2 + self.decode_tokens

    @property
    def peer_tokens(self) -> int:
        """Longest prompt and answer together."""
        decodes = [size + self.max_tokens(count, size) for count, size in self.decodes]
        return max([num_tokens + 1 for num_tokens in self.prefill_tokens] + decodes, default=1)


def run_engine_bench(options: EngineBenchOptions, progress: Callable[[str], None]) -> Report:
    """Load all sides and measure. Raises BenchError if a peer can't be measured."""
    progress("loading the engine")
    bench = EngineBench(options, progress)
    progress("starting transformers and others")
    with open_peers(options.peers, options.model_dir, options.num_threads, options.peer_tokens) as peers:
        return bench.run(peers)


class EngineBench:
    """The engine, loaded once, and all that is measured of it."""

    def __init__(self, options: EngineBenchOptions, progress: Callable[[str], None]) -> None:
        self._options = options
        self._progress = progress
        set_num_threads(1)
        runner = ModelRunner(options.model_dir)
        self._vocab_size = runner.vocab_size
        self._bytes_per_token = runner.layout(BLOCK_SIZE).bytes_per_token
        tokenizer: Any = AutoTokenizer.from_pretrained(options.model_dir, local_files_only=True)
        prefills = [num_tokens + 1 for num_tokens in options.prefill_tokens]
        decodes = [count * (size + options.max_tokens(count, size) + BLOCK_SIZE) for count, size in options.decodes]
        config = EngineConfig(
            "decode",
            "bench",
            num_blocks=2 + max(prefills + decodes) // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            step_tokens=options.chunk_tokens,
            num_threads=options.num_threads,
        )
        self._runner, self._tokenizer = runner, tokenizer
        self._engine = Engine(runner, config, tokenizer)
        self._engine.take_memory()
        config_of_model = AutoConfig.from_pretrained(options.model_dir, local_files_only=True)
        auto_model: Any = AutoModelForCausalLM
        with torch.device("meta"):
            self._shape = auto_model.from_config(config_of_model)
        self._peers: Sequence[Peer] = ()

    def run(self, peers: Sequence[Peer]) -> Report:
        """Everything in turn, the peers beside it where they can do the same."""
        started = time.perf_counter()
        self._peers = peers
        report = Report("engine")
        roofline = self._measure("roofline", lambda: Roofline.measure(self._options.num_threads))
        with self._engine:
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
        report.figures += self._measure("warm turns", self._warm_turns)
        report.figures += self._measure("CPU seconds with the cache and without reuse", self._cache_cost)
        report.seconds = time.perf_counter() - started
        return report

    def _measure(self, what: str, run: Callable[..., Any]) -> Any:
        self._progress(what)
        return run()

    # -- prefill ------------------------------------------------------------------------------------

    def _prefill(self, num_tokens: int, roofline: Roofline) -> list[Figure]:
        prompt = self._prompt(num_tokens)
        runs: dict[str, Callable[[], float]] = {
            "engine": lambda: num_tokens / self._ask([prompt], 1).first_token_s,
        }
        for peer in self._peers:
            runs[peer.name] = partial(lambda peer: num_tokens / peer.ask([prompt], 1).first_token_s, peer)
        speeds = interleaved(runs, self._options.rounds)
        flops = prefill_flops(self._shape.config, self._num_parameters(), num_tokens)
        bound = num_tokens / (flops / roofline.gemm_flops_per_s)
        name = f"prefill {num_tokens}"
        return [
            Figure(f"{name}, of the roofline", speeds["engine"], "tokens/s", "gemm roofline", bound, 0.7),
            *self._beside_peers(name, speeds, {TRANSFORMERS: 1.2, VLLM: 2.0}),
        ]

    def _beside_peers(self, name: str, speeds: dict[str, float], targets: dict[str, float]) -> list[Figure]:
        """The engine's tokens/s beside those of the peers that have some."""
        return [
            Figure(name, speeds["engine"], "tokens/s", peer.name, speeds[peer.name], targets.get(peer.name))
            for peer in self._peers
            if peer.name in speeds
        ]

    def _num_parameters(self) -> int:
        """Parameters outside the embedding and the output head."""
        total = sum(p.numel() for p in self._shape.parameters())
        embedding = self._shape.get_input_embeddings().weight.numel()
        head = 0 if self._shape.config.tie_word_embeddings else self._head_size
        return int(total - embedding - head)

    @property
    def _head_size(self) -> int:
        return int(self._shape.get_output_embeddings().weight.numel())

    # -- decode -------------------------------------------------------------------------------------

    def _decode(self, num_sequences: int, num_tokens: int, roofline: Roofline) -> list[Figure]:
        prompts = [self._prompt(num_tokens) for _ in range(num_sequences)]
        max_tokens = self._options.max_tokens(num_sequences, num_tokens)
        runs: dict[str, Callable[[], float]] = {
            "engine": lambda: self._ask(prompts, max_tokens).step_s,
        }
        for peer in self._peers:
            if num_sequences <= peer.max_prompts:
                runs[peer.name] = partial(lambda peer: peer.ask(prompts, max_tokens).step_s, peer)
        steps = interleaved(runs, self._options.rounds)
        bound = self._read_bytes(num_sequences, num_tokens) / roofline.read_bytes_per_s * 1e3
        sequences = "1 sequence" if num_sequences == 1 else f"{num_sequences} sequences"
        name, ours = f"decode step, {sequences} of {num_tokens}", steps["engine"] * 1e3
        return [
            Figure(f"{name}, over reading weights and KV", ours, "ms", "read bound", bound, 1.25, lower_is_better=True),
            *self._beside_peers(
                f"decode, {sequences} of {num_tokens}",
                {who: num_sequences / step_s for who, step_s in steps.items()},
                {TRANSFORMERS: 1.0, VLLM: 1.5},
            ),
        ]

    def _read_bytes(self, num_sequences: int, num_tokens: int) -> int:
        weights = self._num_parameters() + self._head_size
        return int(4 * weights + num_sequences * num_tokens * self._bytes_per_token)

    # -- with a store -------------------------------------------------------------------------------

    def _warm_turns(self) -> list[Figure]:
        options = self._options
        warm = WarmTurnOptions(
            options.num_threads,
            options.prefix_tokens,
            rounds=2 * options.rounds + 1,
            chunk_tokens=options.chunk_tokens,
            block_size=BLOCK_SIZE,
            folder=options.folder,
        )
        return measure_warm_turns(self._runner, self._tokenizer, warm)

    def _cache_cost(self) -> list[Figure]:
        options = self._options
        cost = CacheCostOptions(
            options.num_threads,
            prompt_tokens=options.new_prompt_tokens,
            rounds=2 * options.rounds - 1,
            chunk_tokens=options.chunk_tokens,
            block_size=BLOCK_SIZE,
            folder=options.folder,
        )
        return measure_cache_cost(self._runner, self._tokenizer, cost)

    # -- our side ----------------------------------------------------------------------------------

    def _prompt(self, num_tokens: int) -> TokenIds:
        return random_tokens(num_tokens, self._vocab_size)

    def _ask(self, prompts: list[TokenIds], max_tokens: int) -> Timing:
        return ask(self._engine, prompts, max_tokens)
