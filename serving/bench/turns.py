"""Sends prompts to an engine and notes when their tokens come: what the benches of engines share."""

import itertools
import queue
import time
from dataclasses import dataclass

import numpy as np

from cache.hashing import BlockHash, TokenIds, chain_hashes
from serving.bench.report import differences
from serving.engine.engine import Engine
from serving.engine.sequence import EngineRequest, Listener
from serving.protocol import SamplingParams, TokenBatch, Usage

_numbers = itertools.count(1)
"""No two requests of a process have the same id, whoever asks."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When the tokens of each sequence came, in seconds after the start, and what each cost."""

    times: list[list[float]]
    usages: list[Usage]

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


def random_tokens(num_tokens: int, vocab_size: int, seed: int | None = None) -> TokenIds:
    """A prompt that nobody has seen before, or the one of a seed."""
    rng = np.random.default_rng(2**32 + next(_numbers) if seed is None else seed)
    return rng.integers(10, vocab_size, num_tokens).astype(np.int32)


def new_request(
    prompt: TokenIds, block_size: int, max_tokens: int, root_hash: BlockHash | None = None
) -> EngineRequest:
    """A request for exactly `max_tokens` greedy tokens. Without a `root_hash` nothing is looked up and nothing kept."""
    number = next(_numbers)
    root = root_hash or BlockHash(number.to_bytes(16, "little"))
    hashes = tuple(chain_hashes(root, prompt, block_size))
    params = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(f"bench-{number}", prompt, root, hashes, params, use_cache=root_hash is not None)


def ask(engine: Engine, prompts: list[TokenIds], max_tokens: int, root_hash: BlockHash | None = None) -> Timing:
    """Send all prompts at once, each as a `new_request`, and wait for all answers.

    Raises RuntimeError if a request fails.
    """
    events: queue.Queue[tuple[int, float, TokenBatch]] = queue.Queue()
    started = time.perf_counter()
    for at, prompt in enumerate(prompts):
        engine.submit(new_request(prompt, engine.config.block_size, max_tokens, root_hash), _listener(at, events))
    return _collect(len(prompts), events, started)


def _listener(at: int, events: "queue.Queue[tuple[int, float, TokenBatch]]") -> Listener:
    return Listener(lambda batch: events.put((at, time.perf_counter(), batch)))


def _collect(count: int, events: "queue.Queue[tuple[int, float, TokenBatch]]", started: float) -> Timing:
    times: list[list[float]] = [[] for _ in range(count)]
    usages: dict[int, Usage] = {}
    while len(usages) < count:
        at, when, batch = events.get()
        times[at].append(when - started)
        if batch.finish_reason is not None:
            if batch.finish_reason not in ("stop", "length") or batch.usage is None:
                raise RuntimeError(f"the engine failed a request: {batch.text}")
            usages[at] = batch.usage
    return Timing(times, [usages[at] for at in range(count)])
