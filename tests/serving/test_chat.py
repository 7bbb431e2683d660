import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serving.chat import ChatMessage, ChatTemplate, ChatTemplateError, NoChatTemplate, without_tools
from serving.tool_calls import Tool, ToolCall, result_text, tools_text

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


WEATHER = Tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}}, "Tells the weather")
CALL = ToolCall("call_1", "weather", '{"city":"Köln"}')
TOOL_TURN = [
    ChatMessage("user", "Is it warm?"),
    ChatMessage("assistant", "Let me see.", tool_calls=(CALL,)),
    ChatMessage("tool", "20 degrees", tool_call_id="call_1"),
    ChatMessage("tool", "sunny", tool_call_id="call_2"),
]
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ 'TOOL ' + tool['function'] | tojson + '\n' }}{% endfor %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] }}({{ call['function']['arguments']['city'] }})"
    "{% endfor %}{{ (m['tool_call_id'] or '') + '\n' }}{% endfor %}"
)


def text_of(template: str, messages: list[ChatMessage], tools: list[Tool]) -> str:
    tokenizer = byte_tokenizer(template)
    return str(tokenizer.decode(ChatTemplate(tokenizer).render(messages, tools).tolist()))


def test_a_template_that_knows_tools_gets_them_with_calls_and_results() -> None:
    first, *rest = text_of(WITH_TOOLS, TOOL_TURN, [WEATHER]).splitlines()
    assert json.loads(first.removeprefix("TOOL ")) == WEATHER.as_template_input()["function"]
    assert rest == [
        "user: Is it warm?",
        "assistant: Let me see.weather(Köln)",
        "tool: 20 degreescall_1",
        "tool: sunnycall_2",
    ]
    assert text_of(WITH_TOOLS, TOOL_TURN, []).splitlines() == rest


def test_one_that_does_not_is_told_of_them_in_plain_messages() -> None:
    plain = without_tools(TOOL_TURN, [WEATHER])
    assert [message.role for message in plain] == ["system", "user", "assistant", "user"]
    assert plain[0].content == tools_text([WEATHER])
    assert plain[2].content == f"Let me see.\n{CALL.as_text()}"
    assert plain[3].content == f"{result_text('20 degrees')}\n{result_text('sunny')}"
    assert text_of(CHATML, TOOL_TURN, [WEATHER]) == text_of(CHATML, plain, [])


def test_the_description_of_tools_follows_what_the_system_says() -> None:
    system = ChatMessage("system", "Be kind.")
    (told,) = without_tools([system], [WEATHER])
    assert told.content == f"Be kind.\n\n{tools_text([WEATHER])}"
    later = [ChatMessage("user", "hi"), system]
    assert without_tools(later, [WEATHER])[1:] == later
    assert without_tools([system, *later], []) == [system, *later]
