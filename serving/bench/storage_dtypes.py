"""What storing KV in another dtype costs and gives: size, speed, and what it does to the model's answers.

The KV of real text is computed once. For each dtype it goes through a pool's own `export` and `import_`, and the
model reads on in the same text, once over the exact KV and once over what was loaded: so the two sets of logits
differ by the stored dtype alone. The text is the reference manual that comes with Python.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from cache.extent import KVShape, aligned_empty
from cache.hashing import TokenIds
from serving.bench.report import Figure, interleaved
from serving.engine.kv_pool import KVPool
from serving.engine.runner import ModelRunner, set_num_threads
from serving.engine.step_batch import SequencePart, build_step_batch

BLOCK_SIZE = 32
CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class LogitsEffect:
    """How logits, over loaded KV for example, differ from the exact ones, `(positions, vocab_size)` each."""

    max_abs_diff: float
    mean_abs_diff: float
    changed_share: float
    """Share of the positions whose most likely token is another."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of the next token's distribution from the exact one, in nats."""

    @classmethod
    def between(cls, exact: torch.Tensor, loaded: torch.Tensor) -> "LogitsEffect":
        diff = (exact - loaded).abs()
        log_exact, log_loaded = exact.double().log_softmax(-1), loaded.double().log_softmax(-1)
        kl = (log_exact.exp() * (log_exact - log_loaded)).sum(-1)
        changed = (exact.argmax(-1) != loaded.argmax(-1)).double()
        return cls(float(diff.max()), float(diff.mean()), float(changed.mean()), float(kl.mean()))


def measure_storage_dtypes(
    model_dir: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    num_tokens: int = 1024,
    num_continued: int = 32,
    num_texts: int = 4,
    dtypes: Sequence[str] = tuple(KVShape.DTYPES),
    num_threads: int = 1,
    rounds: int = 5,
) -> list[Figure]:
    """Figures of each dtype, the engine's own first: it is what the others are held against.

    Speeds are in bytes of the engine's dtype, one thread, memory to memory. The logits are those of the next
    `num_continued` tokens of `num_texts` texts after `num_tokens` tokens each, whose KV is stored and loaded.
    ValueError if the model's tokenizer makes fewer tokens of a text.
    """
    before = torch.get_num_threads()
    set_num_threads(num_threads)
    try:
        progress("loading the model for the storage dtypes")
        bench = _Bench(ModelRunner(model_dir), num_tokens, num_continued)
        order = [bench.engine_dtype, *(dtype for dtype in dtypes if dtype != bench.engine_dtype)]
        effects = bench.effects(order, manual_texts(model_dir, num_texts, num_tokens + num_continued), progress)
        progress("storing and loading in each dtype")
        set_num_threads(1)  # as in a loader
        speeds = bench.speeds(order, rounds)
    finally:
        set_num_threads(before)
    return [figure for dtype in order for figure in bench.figures(dtype, speeds, effects[dtype])]


class _Bench:
    """One model with the KV of one text at a time."""

    def __init__(self, runner: ModelRunner, num_tokens: int, num_continued: int) -> None:
        self._runner = runner
        self._layout = runner.layout(BLOCK_SIZE)
        self._num_tokens = num_tokens
        self._num_blocks = -(-num_tokens // BLOCK_SIZE)
        # What follows gets blocks of its own, so that it never overwrites what is stored.
        self._table = range(-(-(num_tokens + num_continued) // BLOCK_SIZE))
        self._exact = self._pool(self.engine_dtype)
        self._spread = 0.0

    @property
    def engine_dtype(self) -> str:
        return self._layout.dtype

    def _pool(self, dtype: str) -> KVPool:
        return KVPool(self._layout, len(self._table), self._runner.device, dtype)

    def _stored_blocks(self) -> list[tuple[int, int]]:
        """All blocks of the prompt with their tokens; the last may be a tail."""
        rest = self._num_tokens - (self._num_blocks - 1) * BLOCK_SIZE
        return [(index, BLOCK_SIZE if index < self._num_blocks - 1 else rest) for index in range(self._num_blocks)]

    # -- effect on the logits -----------------------------------------------------------------------

    def effects(
        self, dtypes: Sequence[str], texts: Sequence[TokenIds], progress: Callable[[str], None]
    ) -> dict[str, LogitsEffect]:
        exact: list[torch.Tensor] = []
        loaded: dict[str, list[torch.Tensor]] = {dtype: [] for dtype in dtypes}
        for number, text in enumerate(texts, 1):
            progress(f"computing the KV of {self._num_tokens} tokens, text {number} of {len(texts)}")
            compute_prompt(self._runner, self._exact, text[: self._num_tokens], self._table)
            exact.append(self._continue(self._exact, text))
            for dtype in dtypes:
                loaded[dtype].append(self._continue(self._stored_and_loaded(dtype), text))
        all_exact = torch.cat(exact)
        self._spread = float(all_exact.std(-1).mean())
        return {dtype: LogitsEffect.between(all_exact, torch.cat(logits)) for dtype, logits in loaded.items()}

    def _stored_and_loaded(self, dtype: str) -> KVPool:
        """A pool that holds what comes back of the exact KV."""
        source, target = self._pool(dtype), self._pool(dtype)
        source.kv.copy_(self._exact.kv)
        payload = aligned_empty(source.stored_shape.bytes_per_token * self._num_tokens)
        source.export(self._stored_blocks(), payload)
        self._import(target, payload)
        return target

    def _continue(self, pool: KVPool, text: TokenIds) -> torch.Tensor:
        """Logits after each token that follows the prompt, `(num_continued, vocab_size)`."""
        return logits_after(self._runner, pool, text, self._num_tokens, self._table)

    def _import(self, pool: KVPool, payload: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        start = 0
        for block_id, num_tokens in self._stored_blocks():
            end = start + num_tokens * pool.stored_shape.bytes_per_token
            pool.import_(block_id, num_tokens, payload[start:end])
            start = end

    # -- speed --------------------------------------------------------------------------------------

    def speeds(self, dtypes: Sequence[str], rounds: int) -> dict[str, float]:
        """Bytes of the engine's dtype per second: `export DTYPE` and `import DTYPE`, all taken in turn."""
        runs: dict[str, Callable[[], float]] = {}
        for dtype in dtypes:
            pool = self._pool(dtype)
            pool.kv.copy_(self._exact.kv)
            payload = aligned_empty(pool.stored_shape.bytes_per_token * self._num_tokens)
            runs[f"export {dtype}"] = self._timed(lambda p=pool, to=payload: p.export(self._stored_blocks(), to))
            runs[f"import {dtype}"] = self._timed(lambda p=pool, of=payload: self._import(p, of))
        for run in runs.values():
            run()  # the first one takes memory from the machine
        return interleaved(runs, rounds)

    def _timed(self, move: Callable[..., None]) -> Callable[[], float]:
        num_bytes = self._layout.bytes_per_token * self._num_tokens

        def run() -> float:
            started = time.perf_counter()
            move()
            return num_bytes / (time.perf_counter() - started)

        return run

    # -- figures ------------------------------------------------------------------------------------

    def figures(self, dtype: str, speeds: dict[str, float], effect: LogitsEffect) -> list[Figure]:
        name, own = f"stored as {dtype}", f"as {self.engine_dtype}"
        num_bytes = self._layout.stored_shape(dtype).bytes_per_token
        spread = "spread of the logits"
        return [
            Figure(f"{name}: a token", num_bytes, "bytes", own, self._layout.bytes_per_token, lower_is_better=True),
            *(
                Figure(f"{name}: {way}", speeds[f"{way} {dtype}"] / 1e9, "GB/s of engine bytes", own, limit / 1e9)
                for way in ("export", "import")
                if (limit := speeds[f"{way} {self.engine_dtype}"])
            ),
            Figure(
                f"{name}: largest change of a logit",
                effect.max_abs_diff,
                "",
                spread,
                self._spread,
                lower_is_better=True,
            ),
            Figure(
                f"{name}: mean change of a logit", effect.mean_abs_diff, "", spread, self._spread, lower_is_better=True
            ),
            Figure(f"{name}: greedy tokens that change", effect.changed_share * 100, "%", lower_is_better=True),
            Figure(f"{name}: KL divergence", effect.mean_kl, "nats", lower_is_better=True),
        ]


def compute_prompt(runner: ModelRunner, pool: KVPool, prompt: TokenIds, table: Sequence[int]) -> None:
    """Have `pool` hold the prompt's KV in the blocks of `table`."""
    for start in range(0, len(prompt), CHUNK_TOKENS):
        part = SequencePart(prompt[start : start + CHUNK_TOKENS], start, table, wants_logits=False)
        runner.forward(build_step_batch(pool, [part]))


def logits_after(
    runner: ModelRunner, pool: KVPool, text: TokenIds, num_tokens: int, table: Sequence[int]
) -> torch.Tensor:
    """Logits after each token behind the first `num_tokens`, whose KV is there, `(len(text) - num_tokens, vocab)`."""
    batch = build_step_batch(pool, [SequencePart(text[num_tokens:], num_tokens, table)])
    wanted = torch.arange(batch.num_tokens, device=pool.device)
    return runner.forward(replace(batch, logits_indices=wanted)).cpu()


def manual_texts(model_dir: Path, num_texts: int, num_tokens: int) -> list[TokenIds]:
    """The first `num_tokens` tokens of the longest topics of Python's manual. ValueError if there are fewer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    texts: list[TokenIds] = []
    for text in sorted(topics.values(), key=len, reverse=True)[:num_texts]:
        # A token is six letters or so: what lies far beyond is not worth the time.
        token_ids = tokenizer.encode(text[: num_tokens * 20], add_special_tokens=False)[:num_tokens]
        if len(token_ids) < num_tokens:
            raise ValueError(f"the text has {len(token_ids)} tokens, not {num_tokens}: measure shorter prompts")
        texts.append(np.asarray(token_ids, np.int32))
    return texts
