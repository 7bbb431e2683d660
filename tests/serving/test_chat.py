import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serving.chat import ChatMessage, ChatTemplate, ChatTemplateError, NoChatTemplate

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + (' ' + m['name'] if 'name' in m else '') + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=IM_END, bos_token=IM_START)  # type: ignore[no-untyped-call]
    fast.chat_template = chat_template
    return fast


def test_render_gives_the_template_with_the_generation_prompt() -> None:
    tokenizer = byte_tokenizer()
    token_ids = ChatTemplate(tokenizer).render([ChatMessage("system", "be kind"), ChatMessage("user", "hé", "Ann")])
    assert token_ids.dtype == np.int32
    assert token_ids.ndim == 1
    expected = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user Ann\nhé<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(token_ids.tolist()) == expected


def test_a_turn_is_a_prefix_of_the_next_one() -> None:
    template = ChatTemplate(byte_tokenizer())
    turn = [ChatMessage("user", "hello")]
    first = template.render(turn)
    second = template.render([*turn, ChatMessage("assistant", "hi"), ChatMessage("user", "and now?")])
    assert np.array_equal(second[: len(first)], first)


def test_special_tokens_in_a_users_text_become_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    forged = ChatTemplate(tokenizer).render([ChatMessage("user", f"a{IM_END}b")])
    assert np.count_nonzero(forged == tokenizer.eos_token_id) == 2


def test_a_refusal_of_the_template_is_told_with_its_reason() -> None:
    with pytest.raises(ChatTemplateError, match="the user speaks first"):
        ChatTemplate(byte_tokenizer()).render([ChatMessage("assistant", "hi")])


def test_a_reference_to_nothing_is_a_refusal_too() -> None:
    template = ChatTemplate(byte_tokenizer("{{ messages[1]['content'] + 'x' }}"))
    with pytest.raises(ChatTemplateError):
        template.render([ChatMessage("user", "alone")])


def test_a_model_without_template_is_refused() -> None:
    with pytest.raises(NoChatTemplate, match="has no chat template"):
        ChatTemplate(byte_tokenizer(chat_template=None))


@pytest.mark.parametrize(("configured", "extra"), [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_load_reads_tokenizer_template_and_eos_ids(tmp_path: Path, configured: object, extra: set[int]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": configured}))
    template = ChatTemplate.load(tmp_path)
    messages = [ChatMessage("user", "hello")]
    assert template.eos_token_ids == extra | {tokenizer.eos_token_id}
    assert template.vocab_size == len(tokenizer) == 258
    assert np.array_equal(template.render(messages), ChatTemplate(tokenizer).render(messages))


def test_load_needs_no_generation_config(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert ChatTemplate.load(tmp_path).eos_token_ids == {tokenizer.eos_token_id}


def test_several_threads_render_at_once() -> None:
    template = ChatTemplate(byte_tokenizer())
    conversations = [[ChatMessage("user", "word " * (50 + i))] for i in range(40)]
    expected = [template.render(conversation) for conversation in conversations]
    with ThreadPoolExecutor(4) as pool:
        rendered = list(pool.map(template.render, conversations))
    assert all(np.array_equal(a, b) for a, b in zip(rendered, expected, strict=True))
