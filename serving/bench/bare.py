"""An engine alone in a process: no Ray, no warehouse, no handoff, nothing but its arithmetic.

What two of these cost each other, sharing a machine's memory and caches, is what any two engines do.
"""

import multiprocessing
import queue
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cache.hashing import TokenIds, as_token_ids
from serving.bench.turns import new_request
from serving.engine.engine import Engine, EngineConfig
from serving.engine.runner import ModelRunner
from serving.engine.sequence import Listener
from serving.engine.step_log import StepRecord
from serving.protocol import TokenBatch

BLOCK_SIZE = 32
START_TIMEOUT_S = 120.0


class BareEngine:
    """Speaks to the process. Calls end when the work has."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection

    def prefill(self, token_ids: TokenIds) -> None:
        """Compute a prompt and one token."""
        self._call("prefill", token_ids)

    def begin_streams(self, prompts: Sequence[TokenIds], max_tokens: int) -> None:
        """Returns when all of them have their first token; they go on until `end_streams`."""
        self._call("begin_streams", tuple(prompts), max_tokens)

    def end_streams(self) -> None:
        self._call("end_streams")

    def steps(self, since: float) -> tuple[StepRecord, ...]:
        """See `StepLog.since`."""
        steps: tuple[StepRecord, ...] = self._call("steps", since)
        return steps

    def _call(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        return self._connection.recv()


@contextmanager
def bare_engine(model_dir: Path, num_blocks: int, chunk_tokens: int) -> Iterator[BareEngine]:
    """A process with an engine on one thread, ended with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, model_dir, num_blocks, chunk_tokens), daemon=True)
    process.start()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise TimeoutError(f"the engine was not up in {START_TIMEOUT_S:.0f} s")
        ours.recv()
        yield BareEngine(ours)
    finally:
        process.kill()  # it holds nothing but memory
        process.join()
        ours.close()


def _serve(connection: "Connection[Any, Any]", model_dir: Path, num_blocks: int, chunk_tokens: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever pressed ctrl-C meant the bench, which ends this
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    config = EngineConfig("decode", "bare", num_blocks, block_size=BLOCK_SIZE, step_tokens=chunk_tokens)
    engine = Engine(ModelRunner(model_dir), config, tokenizer)
    engine.start()
    work = _Work(engine)
    work.prefill(as_token_ids([0] * chunk_tokens))  # reads the weights in
    connection.send(None)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(work, name)(*arguments))


class _Work:
    """The process's side."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: list[str] = []

    def prefill(self, token_ids: TokenIds) -> None:
        batches: queue.Queue[TokenBatch] = queue.Queue()
        self._submit(token_ids, 1, batches)
        batches.get()

    def begin_streams(self, prompts: tuple[TokenIds, ...], max_tokens: int) -> None:
        streams: list[queue.Queue[TokenBatch]] = [queue.Queue() for _ in prompts]
        self._streams = [
            self._submit(prompt, max_tokens, batches) for prompt, batches in zip(prompts, streams, strict=True)
        ]
        for batches in streams:
            batches.get()

    def end_streams(self) -> None:
        for request_id in self._streams:
            self._engine.cancel(request_id)

    def steps(self, since: float) -> tuple[StepRecord, ...]:
        return self._engine.steps.since(since)

    def _submit(self, token_ids: TokenIds, max_tokens: int, batches: "queue.Queue[TokenBatch]") -> str:
        request = new_request(token_ids, BLOCK_SIZE, max_tokens)
        self._engine.submit(request, Listener(batches.put))
        return request.request_id
