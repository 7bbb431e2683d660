"""Turns whose KV is stored in each dtype: it is found again, it is near, and no other dtype's is ever found."""

from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch

from cache.extent import ALIGNMENT, KVShape
from cache.hashing import BlockHash
from cache.node_store import NodeStore
from serving.engine.engine import Engine
from serving.engine.runner import ModelRunner, set_num_threads
from serving.protocol import SamplingParams, TokenLogprob
from tests.oracle import Oracle
from tests.serving.engine.harness import (
    BLOCK_SIZE,
    EngineUnderTest,
    Handoff,
    make_engine,
    open_store,
    prompt_of,
    running,
)

LARGEST_SHIFT = {"float32": 0.0, "float16": 0.02, "bfloat16": 0.15, "float8_e4m3fn": 1.0, "int8": 0.3}
"""How far the log-probabilities of a random model may move, by stored dtype."""
PROMPT = prompt_of(BLOCK_SIZE * 6 + 5)
NUM_TOP = 20


@dataclass(frozen=True)
class Told:
    """The first token of an answer, with what the engine thought of the others, and where its KV came from."""

    first: TokenLogprob
    token_ids: list[int]
    dram_tokens: int
    disk_tokens: int
    computed_tokens: int


def ask(engine: EngineUnderTest, root: BlockHash, prompt: list[int] = PROMPT, max_tokens: int = 12) -> Told:
    sampling = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True, num_logprobs=NUM_TOP)
    pending = engine.submit(prompt, sampling, root=root)
    first = pending.first()
    rest = pending.wait()
    return Told(
        first.logprobs[0],
        [*first.token_ids, *rest.token_ids],
        rest.cost.dram_tokens,
        rest.cost.disk_tokens,
        rest.cost.decode_computed_tokens,
    )


def shift(exact: TokenLogprob, loaded: TokenLogprob) -> float:
    """Largest change of a log-probability among the tokens that both name."""
    others = dict(loaded.top)
    shared = [(value, others[token_id]) for token_id, value in exact.top if token_id in others]
    assert len(shared) > NUM_TOP // 2
    return max(abs(a - b) for a, b in shared)


def root_of(model_dir: Path, kv_dtype: str | None) -> BlockHash:
    return ModelRunner(model_dir).fingerprint("weights", BLOCK_SIZE, kv_dtype=kv_dtype).root_hash()


def engine_of(model_dir: Path, store: NodeStore, kv_dtype: str | None, replica_id: str = "engine") -> Engine:
    return make_engine(model_dir, store, replica_id=replica_id, kv_dtype=kv_dtype)


@pytest.mark.parametrize("kv_dtype", [None, *KVShape.DTYPES])
def test_a_turn_is_loaded_again_from_disk(
    tiny_model_dir: Path, tmp_path: Path, oracle: Oracle, kv_dtype: str | None
) -> None:
    root = root_of(tiny_model_dir, kv_dtype)
    with open_store(tmp_path) as store, running(engine_of(tiny_model_dir, store, kv_dtype)) as engine:
        exact = ask(engine, root)
        assert exact.computed_tokens == len(PROMPT)
        oracle.check(PROMPT, exact.token_ids, 12)
    with open_store(tmp_path) as store, running(engine_of(tiny_model_dir, store, kv_dtype)) as engine:
        loaded = ask(engine, root)
        assert loaded.dram_tokens + loaded.disk_tokens == len(PROMPT) - 1, "all but the last token"
        assert engine.engine.counters["loaded_tokens"] == len(PROMPT) - 1
        assert engine.engine.counters["computed_prompt_tokens"] == 1
        store.check_integrity()
    largest = LARGEST_SHIFT[kv_dtype or "float32"]
    moved = shift(exact.first, loaded.first)
    if largest == 0.0:
        assert loaded.token_ids == exact.token_ids
        assert moved < 1e-4, "one token is computed in another batch, with the same KV"
    else:
        assert 1e-5 < moved < largest


@pytest.mark.parametrize("kv_dtype", [None, "bfloat16", "int8"])
def test_the_warehouse_holds_the_stored_bytes_and_headers(tiny_model_dir: Path, kv_dtype: str | None) -> None:
    with open_store(None) as store:
        engine = engine_of(tiny_model_dir, store, kv_dtype)
        with running(engine) as under_test:
            num_tokens = len(PROMPT) + len(ask(under_test, root_of(tiny_model_dir, kv_dtype)).token_ids) - 1
        shape = ModelRunner(tiny_model_dir).layout(BLOCK_SIZE).stored_shape(kv_dtype)
        num_bytes = num_tokens * shape.bytes_per_token
        # Full blocks and a tail: two extents.
        assert num_bytes < store.stats().dram_bytes <= num_bytes + 2 * ALIGNMENT


def test_no_dtype_finds_the_blocks_of_another(tiny_model_dir: Path, tmp_path: Path) -> None:
    dtypes = list(KVShape.DTYPES)
    roots = {kv_dtype: root_of(tiny_model_dir, kv_dtype) for kv_dtype in dtypes}
    assert len(set(roots.values())) == len(dtypes)
    assert roots["float32"] == root_of(tiny_model_dir, None), "the engine's own dtype by name"
    with open_store(tmp_path) as store:
        for kv_dtype in dtypes:
            with running(engine_of(tiny_model_dir, store, kv_dtype)) as engine:
                assert ask(engine, roots[kv_dtype]).computed_tokens == len(PROMPT), "a miss: the others' lie there"
        for kv_dtype in dtypes:
            with running(engine_of(tiny_model_dir, store, kv_dtype)) as engine:
                assert ask(engine, roots[kv_dtype]).dram_tokens == len(PROMPT) - 1, "all lie side by side"
        store.check_integrity()


def test_a_prefill_replica_hands_off_in_the_stored_dtype(tiny_model_dir: Path) -> None:
    root = root_of(tiny_model_dir, "int8")
    with (
        open_store(None) as store,
        running(engine_of(tiny_model_dir, store, "int8", "prefill")) as prefill,
        running(engine_of(tiny_model_dir, store, "int8", "decode")) as decode,
    ):
        handoff = Handoff(prefill, decode)
        answer = handoff.submit(PROMPT, SamplingParams(8, temperature=0.0, ignore_eos=True), "r", root=root).wait()
        assert answer.cost.prefill_tokens == len(PROMPT)
        assert len(answer.token_ids) == 8


def test_a_loader_s_threads_leave_the_step_loop_its_own() -> None:
    """The number of torch's threads counts per thread, also where a thread has not computed anything yet."""
    barrier = Barrier(2)
    seen: list[int] = []

    def step_loop() -> None:
        set_num_threads(2)
        barrier.wait(30)
        barrier.wait(30)
        seen.append(torch.get_num_threads())

    def load() -> None:
        barrier.wait(30)
        set_num_threads(1)
        barrier.wait(30)

    threads = [Thread(target=step_loop), Thread(target=load)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [2]
