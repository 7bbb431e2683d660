"""Greedy decoding through step batches is what transformers' own `generate` gives."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from serving.engine.families import UnsupportedModelError
from serving.engine.kv_pool import KVPool
from serving.engine.linear import Weights
from serving.engine.runner import ModelRunner, config_digest, quiet_loading, set_num_threads
from serving.engine.step_batch import SequencePart, build_step_batch
from tests.tiny_models import FAMILIES, build_tiny_model

BLOCK_SIZE = 8
NUM_NEW_TOKENS = 24

TEXTS = (
    "The agent sends its whole history again with every turn.",
    "hi",
    "def main(args):\n    return [token for token in args if token]\n" * 3,
    "привет, 😀",
)


@pytest.fixture(scope="module", params=FAMILIES)
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    set_num_threads(1)
    return build_tiny_model(tmp_path_factory.mktemp("models") / request.param, seed=3, family=request.param)


def load_oracle(model_dir: Path) -> Any:
    with quiet_loading():
        return AutoModelForCausalLM.from_pretrained(model_dir)


def prompts(model_dir: Path) -> list[list[int]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    return [tokenizer.encode(text) for text in TEXTS]


def oracle_tokens(model: Any, prompt: list[int]) -> list[int]:
    # No end-of-sequence token, so that all answers have the same length and many steps are compared.
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(prompt) :]]


@dataclass
class Decoding:
    """One sequence being decoded greedily with a block table made by hand."""

    prompt: list[int]
    block_table: list[int]
    num_computed: int = 0
    answer: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.answer) == NUM_NEW_TOKENS

    def next_part(self, max_tokens: int) -> SequencePart:
        waiting = (self.prompt + self.answer)[self.num_computed :][:max_tokens]
        reaches_end = self.num_computed + len(waiting) == len(self.prompt) + len(self.answer)
        return SequencePart(waiting, self.num_computed, self.block_table, wants_logits=reaches_end)


def decode_all(runner: ModelRunner, decodings: list[Decoding], pool: KVPool, random: Random, chunk: int) -> None:
    """Steps over a random mix of the sequences until all have their tokens."""
    while running := [d for d in decodings if not d.is_done]:
        chosen = random.sample(running, random.randint(1, len(running)))
        parts = [decoding.next_part(chunk) for decoding in chosen]
        logits = runner.forward(build_step_batch(pool, parts))
        tokens = iter(logits.argmax(-1).tolist())
        for decoding, part in zip(chosen, parts, strict=True):
            decoding.num_computed += len(part.token_ids)
            if part.wants_logits:
                decoding.answer.append(next(tokens))
        assert next(tokens, None) is None


def block_tables(num_tokens: list[int], random: Random, fragmented: bool) -> tuple[list[list[int]], int]:
    blocks = list(range(sum(-(-num // BLOCK_SIZE) for num in num_tokens)))
    num_blocks = len(blocks)
    if fragmented:
        random.shuffle(blocks)
    tables = []
    for num in num_tokens:
        num_own = -(-num // BLOCK_SIZE)
        tables.append(blocks[:num_own])
        blocks = blocks[num_own:]
    return tables, num_blocks


@pytest.mark.parametrize(("chunk", "fragmented"), [(1000, False), (16, False), (7, True), (1, True)])
def test_greedy_tokens_are_those_of_generate(family_dir: Path, chunk: int, fragmented: bool) -> None:
    oracle = load_oracle(family_dir)
    runner = ModelRunner(family_dir)
    random = Random(chunk)
    all_prompts = prompts(family_dir)
    tables, num_blocks = block_tables([len(p) + NUM_NEW_TOKENS for p in all_prompts], random, fragmented)
    pool = KVPool(runner.layout(BLOCK_SIZE), num_blocks)
    pool.kv.fill_(float("nan"))
    decodings = [Decoding(prompt, table) for prompt, table in zip(all_prompts, tables, strict=True)]
    decode_all(runner, decodings, pool, random, chunk)
    assert [d.answer for d in decodings] == [oracle_tokens(oracle, prompt) for prompt in all_prompts]


def test_wrong_kv_changes_the_tokens(family_dir: Path) -> None:
    """What makes the other tests worth something: a single wrong block is seen in the answer."""
    runner = ModelRunner(family_dir)
    prompt = prompts(family_dir)[2]
    table = list(range(-(-(len(prompt) + NUM_NEW_TOKENS) // BLOCK_SIZE)))
    answers = []
    for is_wrong in (False, True):
        pool = KVPool(runner.layout(BLOCK_SIZE), len(table))
        runner.forward(build_step_batch(pool, [SequencePart(prompt[:-1], 0, table)]))
        if is_wrong:
            pool.copy_rows(src_slot=0, dst_slot=3 * BLOCK_SIZE, num_tokens=BLOCK_SIZE)
        decoding = Decoding(prompt, table, num_computed=len(prompt) - 1)
        decode_all(runner, [decoding], pool, Random(0), 1000)
        answers.append(decoding.answer)
    assert answers[0] != answers[1]


def test_kv_moved_through_bytes_goes_on_as_before(tiny_model_dir: Path) -> None:
    """Store a prompt's blocks, load them elsewhere in another pool, and get bit-equal logits."""
    runner = ModelRunner(tiny_model_dir)
    prompt = prompts(tiny_model_dir)[2]
    num_blocks = -(-len(prompt) // BLOCK_SIZE)
    first = KVPool(runner.layout(BLOCK_SIZE), num_blocks)
    runner.forward(build_step_batch(first, [SequencePart(prompt[:-1], 0, range(num_blocks))]))
    second = KVPool(runner.layout(BLOCK_SIZE), num_blocks + 5)
    for block_id in range(num_blocks):
        num_tokens = min(BLOCK_SIZE, len(prompt) - 1 - block_id * BLOCK_SIZE)
        if num_tokens > 0:
            payload = np.empty(num_tokens * first.layout.bytes_per_token, dtype=np.uint8)
            first.export([(block_id, num_tokens)], payload)
            second.import_(block_id + 5, num_tokens, payload)
    logits = [
        runner.forward(build_step_batch(pool, [SequencePart(prompt[-1:], len(prompt) - 1, table)]))
        for pool, table in ((first, range(num_blocks)), (second, range(5, num_blocks + 5)))
    ]
    assert torch.equal(logits[0], logits[1])


def test_a_batch_that_wants_no_logits_gets_none(tiny_model_dir: Path) -> None:
    runner = ModelRunner(tiny_model_dir)
    pool = KVPool(runner.layout(BLOCK_SIZE), 1)
    logits = runner.forward(build_step_batch(pool, [SequencePart([5, 6], 0, [0], wants_logits=False)]))
    assert logits.shape == (0, runner.vocab_size)


def test_bfloat16_runs_and_gives_float32_logits(tiny_model_dir: Path) -> None:
    exact, rough = ModelRunner(tiny_model_dir), ModelRunner(tiny_model_dir, dtype="bfloat16")
    prompt = prompts(tiny_model_dir)[0]
    logits = []
    for runner in (exact, rough):
        pool = KVPool(runner.layout(BLOCK_SIZE), 20)
        for span in (slice(0, 9), slice(9, len(prompt))):
            logits.append(runner.forward(build_step_batch(pool, [SequencePart(prompt[span], span.start, range(20))])))
    assert logits[3].dtype == torch.float32
    torch.testing.assert_close(logits[3], logits[1], atol=0.5, rtol=0.1)
    assert rough.fingerprint("w", 8).root_hash() != exact.fingerprint("w", 8).root_hash()


def test_what_the_runner_says_of_the_model(tiny_model_dir: Path) -> None:
    runner = ModelRunner(tiny_model_dir)
    assert runner.max_model_len == 4096
    assert runner.vocab_size == 300
    assert runner.eos_token_ids == {2}
    assert runner.layout(32).bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert repr(runner) == "<ModelRunner llama float32 on cpu>"


@pytest.fixture
def copied_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model_dir, copy)
    return copy


def edit_config(model_dir: Path, file: str = "config.json", **changes: Any) -> None:
    path = model_dir / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_digest_ignores_names_and_notices_rope(tiny_model_dir: Path, copied_dir: Path) -> None:
    original = ModelRunner(tiny_model_dir).config_digest()
    edit_config(copied_dir, _name_or_path="other", transformers_version="9.9.9", architectures=["LlamaForCausalLM"])
    assert ModelRunner(copied_dir).config_digest() == original
    edit_config(copied_dir, rope_parameters={"rope_type": "default", "rope_theta": 10001.0})
    assert ModelRunner(copied_dir).config_digest() != original


def test_digest_counts_fields_it_does_not_know(tiny_model_dir: Path) -> None:
    config = load_oracle(tiny_model_dir).config
    before = config_digest(config)
    config.some_new_scaling = 2.0
    assert config_digest(config) != before


def test_every_end_token_counts(copied_dir: Path) -> None:
    edit_config(copied_dir, "generation_config.json", eos_token_id=[0, 7])
    assert ModelRunner(copied_dir).eos_token_ids == {0, 2, 7}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported, only llama, mistral, qwen2, qwen3 are"),
        ({"model_type": "mistral", "sliding_window": 128}, r"sliding-window .* \(sliding_window=128"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_models_that_would_be_served_wrongly_are_refused(
    copied_dir: Path, changes: dict[str, Any], reason: str
) -> None:
    edit_config(copied_dir, **changes)
    (copied_dir / "model.safetensors").unlink()  # refused before any weight is read
    with pytest.raises(UnsupportedModelError, match=reason):
        ModelRunner(copied_dir)


def test_a_sliding_window_that_is_not_used_does_no_harm(family_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(family_dir, copy)
    if "qwen" in family_dir.name:
        edit_config(copy, sliding_window=4096, use_sliding_window=False)
    assert ModelRunner(copy).vocab_size == 300


def test_unknown_dtype_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="dtype 'int8' is not supported, choose one of float32"):
        ModelRunner(tiny_model_dir, dtype="int8")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"weights": "int8"}, "weights 'int8' are not supported, choose one of float32, bf16, int4"),
        ({"weights": "int4", "device": "cuda"}, "int4 weights need a CPU and float32, not float32 on cuda"),
        ({"weights": "bf16", "device": "cuda"}, "model.dtype: bfloat16 keeps them in bf16 there"),
        ({"weights": "int4", "dtype": "bfloat16"}, "need a CPU and float32, not bfloat16 on cpu; use model.dtype"),
        ({"weights": "bf16", "dtype": "float16"}, "need a CPU and float32, not float16 on cpu"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied_dir: Path, arguments: dict[str, Any], reason: str) -> None:
    (copied_dir / "model.safetensors").unlink()  # refused before any weight is read
    with pytest.raises(UnsupportedModelError, match=reason):
        ModelRunner(copied_dir, **arguments)


def test_int4_needs_whole_groups(copied_dir: Path) -> None:
    edit_config(copied_dir, intermediate_size=120)
    with pytest.raises(UnsupportedModelError, match=r"groups of 32, .* intermediate size \(120\)"):
        ModelRunner(copied_dir, weights="int4")


def test_only_fused_modules_take_smaller_weights(copied_dir: Path) -> None:
    edit_config(copied_dir, hidden_act="gelu")
    assert ModelRunner(copied_dir).vocab_size == 300
    with pytest.raises(UnsupportedModelError, match=r"llama with gelu runs on stock modules, .* can't be int4"):
        ModelRunner(copied_dir, weights="int4")


def test_numerics_are_in_the_fingerprint(tiny_model_dir: Path) -> None:
    runners = {weights: ModelRunner(tiny_model_dir, weights=weights) for weights in get_args(Weights)}
    roots = {runner.fingerprint("w", BLOCK_SIZE).root_hash() for runner in runners.values()}
    assert len(roots) == 3
    exact = runners["float32"].fingerprint("w", BLOCK_SIZE)
    assert exact.numerics == "float32", "what was stored before is still found"
    for runner in runners.values():
        assert runner.layout(BLOCK_SIZE) == runners["float32"].layout(BLOCK_SIZE)
        assert runner.fingerprint("w", BLOCK_SIZE, numerics="float32") == exact
    half = ModelRunner(tiny_model_dir, "bfloat16", weights="bf16")
    assert half.numerics == "bfloat16", "weights of a bfloat16 model are bf16 in any case"


def test_weights_take_as_much_memory_as_they_say(tiny_model_dir: Path) -> None:
    sizes = {w: ModelRunner(tiny_model_dir, weights=w).num_weight_bytes for w in get_args(Weights)}
    num_embedded = 2 * 300 * 64  # and in the head
    num_products = 3 * ((64 + 2 * 32) * 64 + 64 * 64 + 2 * 128 * 64 + 64 * 128)
    assert sizes["float32"] == 4 * (num_embedded + num_products)
    assert sizes["bf16"] == 2 * (num_embedded + num_products)
    assert sizes["int4"] == 2 * num_embedded + num_products * 5 // 8


def test_loading_is_quiet_and_leaves_progress_bars_as_they_were(
    tiny_model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    ModelRunner(tiny_model_dir)
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled() == was_enabled
