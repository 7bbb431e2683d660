"""Whatever a client gets wrong, the answer is a 4xx in OpenAI's shape that names the field; never a 5xx."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from serving.http_settings import HttpSettings
from tests.serving.http_server import BODY, CHAT, TEXT, TEXT_BODY, VOCAB_SIZE, ScriptedBackend, client_of

MISSING, TYPE, VALUE = "missing_required_parameter", "invalid_type", "invalid_value"
UNSUPPORTED, TOO_LONG, JSON = "unsupported_parameter", "context_length_exceeded", "invalid_json"
USER = {"role": "user", "content": "hi"}


@dataclass(frozen=True)
class Bad:
    """A bad request and the answer that it deserves."""

    sent: dict[str, Any]
    param: str | None
    code: str
    status: int = 400
    said: tuple[str, ...] = ()
    """Words that the message must have."""


def both(param: str, value: object, code: str, *said: str) -> Bad:
    """A field that either endpoint refuses."""
    return Bad({"fields": {param: value}}, param, code, said=(param, *said))


def chat(param: str | None, code: str, *said: str, status: int = 400, **fields: Any) -> Bad:
    return Bad({"json": {**BODY, **fields}}, param, code, status, said)


def text(param: str | None, code: str, *said: str, status: int = 400, **fields: Any) -> Bad:
    return Bad({"json": {**TEXT_BODY, **fields}}, param, code, status, said)


def schema(said: str, schema: dict[str, Any]) -> Bad:
    """A response format that no answer can have."""
    asked = {"type": "json_schema", "json_schema": {"name": "point", "schema": schema}}
    param = "response_format.json_schema.schema"
    return chat(param, "invalid_json_schema", "'point'", said, response_format=asked)


def tool_of(parameters: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def raw(body: bytes, param: str | None = None, code: str = JSON) -> Bad:
    return Bad({"content": body, "headers": {"content-type": "application/json"}}, param, code)


AT_BOTH: dict[str, Bad] = {
    "empty body": raw(b""),
    "malformed": raw(b'{"model": '),
    "NaN": raw(b'{"temperature": NaN}'),
    "lone surrogate": raw(b'{"model": "\\ud800"}'),
    "deep": raw(b"[" * 4000),
    "endless number": raw(b'{"seed": ' + b"9" * 4000),
    "not an object": raw(b"[]", code=TYPE),
    "not utf-8": raw(b'{"model": "\xff"}'),
    "huge exponent": raw(b'{"model": "m", "messages": [], "prompt": "a", "min_p": 1e999}', "min_p", VALUE),
    "no content type": Bad({"content": b"{}"}, None, "unsupported_content_type", 415),
    "a form": Bad({"data": {"model": "tiny"}}, None, "unsupported_content_type", 415),
    "too large": Bad({"fields": {"user": "x" * 5000}}, None, "request_too_large", 413),
    "session id": Bad({"fields": {}, "headers": {"x-session-id": "a b"}}, "x-session-id", VALUE),
    "unknown model": Bad({"fields": {"model": "gpt-9"}}, "model", "model_not_found", 404),
    "model is a number": both("model", 5, TYPE),
    "model is null": both("model", None, TYPE),
    "temperature above": both("temperature", 2.01, VALUE, "2"),
    "temperature below": both("temperature", -0.1, VALUE, "0"),
    "temperature is text": both("temperature", "1", TYPE),
    "temperature is true": both("temperature", True, TYPE),
    "top_p is 0": both("top_p", 0, VALUE),
    "top_p above": both("top_p", 1.5, VALUE),
    "top_k below": both("top_k", -2, VALUE),
    "top_k is a fraction": both("top_k", 1.5, TYPE),
    "top_k beyond int32": both("top_k", 2**40, VALUE),
    "min_p below": both("min_p", -0.1, VALUE),
    "min_p above": both("min_p", 1.1, VALUE),
    "presence_penalty": both("presence_penalty", 2.5, VALUE, "2"),
    "frequency_penalty": both("frequency_penalty", -2.5, VALUE, "-2"),
    "repetition_penalty is 0": both("repetition_penalty", 0, VALUE),
    "repetition_penalty is huge": both("repetition_penalty", 1e300, VALUE),
    "logit_bias by name": both("logit_bias", {"hello": 1}, VALUE, "token ids"),
    "logit_bias of a negative id": both("logit_bias", {"-1": 1}, VALUE, "token ids"),
    "logit_bias above": both("logit_bias", {"5": 100.5}, VALUE, "-100 to 100"),
    "logit_bias is text": Bad({"fields": {"logit_bias": {"5": "1"}}}, "logit_bias.5", TYPE),
    "logit_bias is a list": both("logit_bias", [[5, 1]], TYPE),
    "logit_bias beyond the vocabulary": both("logit_bias", {str(VOCAB_SIZE): 1}, VALUE, f"{VOCAB_SIZE - 1}"),
    "min_tokens below": both("min_tokens", -1, VALUE),
    "min_tokens above max_tokens": Bad(
        {"fields": {"min_tokens": 6, "max_tokens": 5}}, "min_tokens", VALUE, said=("6", "5")
    ),
    "ignore_eos is text": both("ignore_eos", "yes", TYPE),
    "stop_token_ids is a number": both("stop_token_ids", 5, TYPE),
    "stop_token_ids is negative": Bad({"fields": {"stop_token_ids": [1, -1]}}, "stop_token_ids[1]", VALUE),
    "stop_token_ids unknown": both("stop_token_ids", [VOCAB_SIZE], VALUE, f"{VOCAB_SIZE}"),
    "seed beyond int64": both("seed", 2**63, VALUE),
    "seed is a fraction": both("seed", 0.5, TYPE),
    "stop is empty": both("stop", "", VALUE),
    "stop has five": both("stop", list("abcde"), TYPE, "4"),
    "stop is a number": both("stop", 5, TYPE),
    "stop is very long": both("stop", "x" * 1025, VALUE, "1024"),
    "n is 0": both("n", 0, VALUE),
    "n is 17": both("n", 17, VALUE, "16"),
    "n is text": both("n", "2", TYPE),
    "max_tokens is 0": both("max_tokens", 0, VALUE),
    "max_tokens is a fraction": both("max_tokens", 1.0, TYPE),
    "max_tokens beyond the context": both("max_tokens", 62, TOO_LONG, "62", "3 tokens", "64", "61"),
    "stream is text": both("stream", "yes", TYPE),
    "stream_options without stream": both("stream_options", {"include_usage": True}, VALUE, "stream"),
    "include_usage is a number": Bad(
        {"fields": {"stream": True, "stream_options": {"include_usage": 1}}}, "stream_options.include_usage", TYPE
    ),
    "our option misspelt": Bad({"fields": {"tokenloft": {"cahce": False}}}, "tokenloft.cahce", "unknown_parameter"),
    "our option is text": Bad({"fields": {"tokenloft": {"cache": "no"}}}, "tokenloft.cache", TYPE),
    "guided": both("guided_json", {"type": "object"}, UNSUPPORTED),
    "beam search": both("use_beam_search", True, UNSUPPORTED),
    "bad words": both("bad_words", ["x"], UNSUPPORTED),
    "allowed tokens": both("allowed_token_ids", [1], UNSUPPORTED),
    "log-probabilities of the prompt": both("prompt_logprobs", 1, UNSUPPORTED),
    "special tokens shown": both("skip_special_tokens", False, UNSUPPORTED),
    "truncation": both("truncate_prompt_tokens", 5, UNSUPPORTED),
}  # fmt: skip

AT_CHAT: dict[str, Bad] = {
    "no messages": Bad({"json": {"model": "tiny"}}, "messages", MISSING),
    "no model": Bad({"json": {"messages": [USER]}}, "model", MISSING),
    "empty messages": chat("messages", VALUE, messages=[]),
    "messages is text": chat("messages", TYPE, messages="hi"),
    "a message is text": chat("messages[0]", TYPE, messages=["hi"]),
    "no role": chat("messages[0].role", MISSING, messages=[{"content": "x"}]),
    "unknown role": chat("messages[1].role", VALUE, messages=[USER, {"role": "king", "content": "x"}]),
    "content is a number": chat("messages[0].content", TYPE, messages=[{"role": "user", "content": 5}]),
    "no content": chat("messages[0].content", MISSING, messages=[{"role": "user"}]),
    "content without parts": chat("messages[0].content", TYPE, messages=[{"role": "user", "content": []}]),
    "an image": chat(
        "messages[0].content[0].type", VALUE, messages=[{"role": "user", "content": [{"type": "image_url"}]}]
    ),
    "a call without an id": chat(
        "messages[0].tool_calls[0].id", MISSING, messages=[{"role": "assistant", "tool_calls": [{}]}]
    ),
    "a call's arguments are no object": chat(
        "messages[0].tool_calls[0].function.arguments",
        VALUE,
        "JSON object",
        messages=[{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1]"}}]}],
    ),
    "a call of a user": chat(
        "messages[0].tool_calls",
        VALUE,
        "assistant",
        messages=[
            {"role": "user", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]}
        ],
    ),
    "refused by the template": chat(
        "messages", "chat_template_error", messages=[{"role": "assistant", "content": "hi"}]
    ),
    "prompt too long": chat("messages", TOO_LONG, "64", messages=[{"role": "user", "content": "w " * 64}]),
    "max_completion_tokens is negative": chat("max_completion_tokens", VALUE, max_completion_tokens=-1),
    "max_completion_tokens beyond the context": chat(
        "max_completion_tokens", TOO_LONG, "max_completion_tokens", "62", "3 tokens", "61", max_completion_tokens=62
    ),
    "logprobs is a number": chat("logprobs", TYPE, logprobs=5),
    "top_logprobs above": chat("top_logprobs", VALUE, "20", logprobs=True, top_logprobs=21),
    "top_logprobs below": chat("top_logprobs", VALUE, logprobs=True, top_logprobs=-1),
    "top_logprobs without logprobs": chat("top_logprobs", VALUE, "logprobs", top_logprobs=2),
    "a tool of another kind": chat("tools[0].type", VALUE, tools=[{"type": "custom", "custom": {"name": "f"}}]),
    "a tool without function": chat("tools[0].function", MISSING, tools=[{"type": "function"}]),
    "a tool's name": chat(
        "tools[0].function.name", VALUE, tools=[{"type": "function", "function": {"name": "not a name"}}]
    ),
    "a name twice": chat("tools", VALUE, "different names", tools=[tool_of({}), tool_of({})]),
    "a choice without tools": chat("tool_choice", VALUE, "only allowed with", tool_choice="auto"),
    "another tool is chosen": chat(
        "tool_choice",
        VALUE,
        "among 'tools'",
        tools=[tool_of({})],
        tool_choice={"type": "function", "function": {"name": "g"}},
    ),
    "an unknown choice": chat("tool_choice", VALUE, tools=[tool_of({})], tool_choice="perhaps"),
    "a tool's schema": chat(
        "tools[1].function.parameters",
        "invalid_function_parameters",
        "function 'f'",
        "Invalid type: nope",
        tools=[tool_of({}, "e"), tool_of({"properties": {"a": {"type": "nope"}}})],
        tool_choice="required",
    ),
    "an unknown format": chat("response_format.type", VALUE, response_format={"type": "xml"}),
    "a format without schema": chat(
        "response_format.json_schema", MISSING, response_format={"type": "json_schema"}
    ),
    "a schema without name": chat(
        "response_format.json_schema.name",
        MISSING,
        response_format={"type": "json_schema", "json_schema": {"schema": {}}},
    ),
    "a schema that asks for what we cannot do": schema("Unimplemented keys", {"type": "array", "uniqueItems": True}),
    "a schema that contradicts itself": schema("minimum", {"type": "integer", "minimum": 5, "maximum": 4}),
    "a schema without end": schema("no text can satisfy it", {"$ref": "#"}),
    "a schema of long words": schema("Invalid type", {"type": "n" * 3000}),
    "functions": chat("functions", UNSUPPORTED, functions=[{"name": "f"}]),
    "audio": chat("modalities", UNSUPPORTED, modalities=["text", "audio"]),
    "search": chat("web_search_options", UNSUPPORTED, web_search_options={}),
    "another template": chat("chat_template", UNSUPPORTED, chat_template="{{ messages }}"),
    "template's arguments": chat("chat_template_kwargs", UNSUPPORTED, chat_template_kwargs={"enable_thinking": False}),
    "going on with a message": chat("continue_final_message", UNSUPPORTED, continue_final_message=True),
}  # fmt: skip

AT_TEXT: dict[str, Bad] = {
    "no prompt": Bad({"json": {"model": "tiny"}}, "prompt", MISSING),
    "no model": Bad({"json": {"prompt": "hi"}}, "model", MISSING),
    "prompt is null": text("prompt", TYPE, "list of token ids", prompt=None),
    "prompt is a number": text("prompt", TYPE, prompt=5),
    "prompt is an object": text("prompt", TYPE, prompt={"text": "hi"}),
    "empty text": text("prompt", VALUE, "empty", prompt=""),
    "empty list": text("prompt", VALUE, "empty", prompt=[]),
    "an empty text in a list": text("prompt", VALUE, "empty", prompt=["hi", ""]),
    "an empty list in a list": text("prompt", VALUE, "empty", prompt=[[1], []]),
    "text and ids": text("prompt", TYPE, prompt=["hi", [1]]),
    "ids and text": text("prompt", TYPE, prompt=[1, "hi"]),
    "ids are fractions": text("prompt", TYPE, prompt=[1, 2.0]),
    "ids are true": text("prompt", TYPE, prompt=[True]),
    "ids three deep": text("prompt", TYPE, prompt=[[[1]]]),
    "an id beyond the vocabulary": text("prompt", VALUE, str(VOCAB_SIZE - 1), prompt=[1, VOCAB_SIZE]),
    "a negative id": text("prompt[1]", VALUE, "-1", prompt=[[1], [-1]]),
    "an id beyond int64": text("prompt", VALUE, prompt=[10**30]),
    "too many prompts": text("prompt", VALUE, "32", prompt=["hi"] * 33),
    "a text without tokens": text("prompt", VALUE, "no tokens", prompt="   "),
    "a text too long": text("prompt[1]", TOO_LONG, "64", prompt=["hi", "w " * 64]),
    "ids too long": text("prompt", TOO_LONG, "64", prompt=[1] * 64),
    "logprobs is true": text("logprobs", TYPE, logprobs=True),
    "logprobs above": text("logprobs", VALUE, "20", logprobs=21),
    "echo is text": text("echo", TYPE, echo="yes"),
    "echo with logprobs": text("echo", UNSUPPORTED, "logprobs", echo=True, logprobs=0),
    "json mode": text("response_format", UNSUPPORTED, response_format={"type": "json_object"}),
    "suffix": text("suffix", UNSUPPORTED, "suffix", suffix="the end"),
    "best_of": text("best_of", UNSUPPORTED, "best_of", best_of=2),
    "best_of more than n": text("best_of", UNSUPPORTED, n=2, best_of=3),
    "no special tokens": text("add_special_tokens", UNSUPPORTED, add_special_tokens=False),
}  # fmt: skip

CASES = [
    *((path, name, bad) for name, bad in AT_BOTH.items() for path in (CHAT, TEXT)),
    *((CHAT, name, bad) for name, bad in AT_CHAT.items()),
    *((TEXT, name, bad) for name, bad in AT_TEXT.items()),
]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with client_of(ScriptedBackend(), HttpSettings(max_body_bytes=4500)) as client:
        yield client


@pytest.mark.parametrize(("path", "bad"), [pytest.param(path, bad, id=f"{path}-{name}") for path, name, bad in CASES])
def test_a_bad_request_is_answered_in_openais_shape(client: httpx.Client, path: str, bad: Bad) -> None:
    sent = dict(bad.sent)
    if "fields" in sent:
        sent["json"] = {**(BODY if path == CHAT else TEXT_BODY), **sent.pop("fields")}
    response = client.post(path, **sent)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (bad.status, bad.param, bad.code)
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in bad.said), error["message"]
    assert len(error["message"]) < 400


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60


def test_the_server_still_answers_after_all_of_them(client: httpx.Client) -> None:
    for path, body in ((CHAT, BODY), (TEXT, TEXT_BODY)):
        assert client.post(path, json=body).status_code == 200
