from typing import Any

import pytest
from pydantic import ValidationError

from serving.chat import ChatMessage
from serving.chat_schema import ChatCompletionRequest
from serving.http_errors import from_pydantic

USER = {"role": "user", "content": "hello"}


def parse(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": [USER], **fields})


def refusal(**fields: Any) -> tuple[str | None, str | None]:
    """`(param, code)` of the error for a body with `fields`."""
    body = {"model": "m", "messages": [USER], **fields}
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate(body)
    error = from_pydantic(caught.value, body)
    assert error.status == 400
    return error.param, error.code


def test_defaults_are_those_of_openai() -> None:
    sampling = parse().sampling(max_tokens=7, default_seed=11)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 1.0, 1.0)
    assert (sampling.seed, sampling.stop) == (11, ())
    assert parse().requested_max_tokens is None
    assert parse().use_cache


def test_null_is_the_same_as_absent() -> None:
    names = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
    asked = parse(**dict.fromkeys(names))
    assert asked.sampling(7, 11) == parse().sampling(7, 11)
    assert asked.unsupported_parameter() is None


def test_zero_is_not_taken_for_absent() -> None:
    sampling = parse(temperature=0, seed=0).sampling(7, 11)
    assert (sampling.temperature, sampling.seed) == (0.0, 0)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_any_int64_is_a_seed(seed: int) -> None:
    assert parse(seed=seed).sampling(7, 11).seed == seed


@pytest.mark.parametrize(("stop", "expected"), [("x", ("x",)), (["x", "yy"], ("x", "yy")), ([], ())])
def test_stop_is_a_string_or_a_list(stop: object, expected: tuple[str, ...]) -> None:
    assert parse(stop=stop).sampling(7, 11).stop == expected


def test_the_newer_name_of_max_tokens_counts() -> None:
    assert parse(max_tokens=3).requested_max_tokens == ("max_tokens", 3)
    assert parse(max_tokens=3, max_completion_tokens=5).requested_max_tokens == ("max_completion_tokens", 5)


def test_text_parts_are_joined_and_developer_becomes_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
    ]
    assert parse(messages=messages).chat_messages() == [
        ChatMessage("system", "rules"),
        ChatMessage("user", "a\nb", "Ann"),
        ChatMessage("assistant", ""),
        ChatMessage("assistant", ""),
    ]


def test_unknown_fields_are_ignored_except_in_our_own_extension() -> None:
    assert parse(store=True, metadata={"a": "b"}, nonsense=[1]).unsupported_parameter() is None
    assert not parse(tokenloft={"cache": False}).use_cache
    assert refusal(tokenloft={"cahce": False}) == ("tokenloft.cahce", "unknown_parameter")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": 5}, "model", "invalid_type"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].id",
            "missing_required_parameter",
        ),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": float("inf")}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.01}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.0}, "max_tokens", "invalid_type"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"stop": list("abcde")}, "stop", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
        ({"tokenloft": True}, "tokenloft", "invalid_type"),
        ({"n": "2"}, "n", "invalid_type"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    assert refusal(**fields) == (param, code)


@pytest.mark.parametrize(
    ("param", "value", "neutral"),
    [
        ("functions", [{}], []),
        ("function_call", "auto", "none"),
        ("modalities", ["text", "audio"], ["text"]),
        ("audio", {"voice": "x"}, None),
        ("web_search_options", {}, None),
        ("echo", True, False),
        ("add_generation_prompt", False, True),
        ("continue_final_message", True, False),
        ("chat_template", "{{ messages }}", None),
        ("chat_template_kwargs", {"enable_thinking": False}, {}),
        ("skip_special_tokens", False, True),
        ("structured_outputs", {"choice": ["a"]}, None),
    ],
)
def test_what_we_cannot_do_is_refused_unless_it_asks_for_nothing(param: str, value: object, neutral: object) -> None:
    assert parse(**{param: value}).unsupported_parameter() == param
    assert parse(**{param: neutral}).unsupported_parameter() is None


def test_log_probabilities_are_asked_for_by_a_switch_and_a_number() -> None:
    assert parse().num_logprobs is None
    assert parse(logprobs=False, top_logprobs=0).num_logprobs is None
    assert parse(logprobs=True).num_logprobs == 0
    assert parse(logprobs=True, top_logprobs=20).sampling(7, 11).num_logprobs == 20
