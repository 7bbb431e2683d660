"""JSON and tool calls over HTTP, by the official client, with a real engine and a random model behind.

The whole way of a request but Ray and the router.
"""

import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel, Field

from serving.chat import ChatTemplate
from serving.http_app import build_app
from tests.serving.engine.harness import make_engine, running
from tests.serving.http_server import serving_app
from tests.serving.test_answer_reuse import EngineBackend

USER = {"role": "user", "content": "Say something."}
EOS = 2
ASK: dict[str, Any] = {"model": "tiny", "messages": [USER], "seed": 1, "logit_bias": {str(EOS): 8}}


class Colour(Enum):
    RED = "rot"
    GREEN = "grün"


class Point(BaseModel):
    x: int = Field(ge=0, le=99)
    y: int = Field(ge=0, le=99)


class Drawing(BaseModel):
    title: str = Field(max_length=8)
    colour: Colour
    points: list[Point] = Field(min_length=1, max_length=3)
    at: Point | None
    kind: Literal["line", "area"]


class Weather(BaseModel):
    """Tells the weather."""

    city: Literal["Rom", "Köln"]
    at: Point


WEATHER = openai.pydantic_function_tool(Weather, name="weather")
CLOCK: Any = {"type": "function", "function": {"name": "clock", "description": "Tells the time", "strict": True}}
TOOLS: Any = [WEATHER, CLOCK]


@pytest.fixture(scope="module")
def backend(tiny_model_dir: Path) -> Iterator[EngineBackend]:
    with running(make_engine(tiny_model_dir, num_blocks=512, block_size=16)) as under_test:
        yield EngineBackend(ChatTemplate.load(tiny_model_dir), under_test.engine, max_model_len=2048)


@pytest.fixture(scope="module")
def client(backend: EngineBackend) -> Iterator[openai.OpenAI]:
    with (
        serving_app(build_app(backend)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=60) as client,
    ):
        yield client


def calls_of(answer: ChatCompletion, choice: int = 0) -> list[tuple[str, Any]]:
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    calls = answer.choices[choice].message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    found: list[tuple[str, Any]] = []
    for call in calls:
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        found.append((call.function.name, json.loads(call.function.arguments)))
    return found


def check_call(name: str, arguments: Any) -> None:
    if name == "weather":
        Weather.model_validate(arguments)
    else:
        assert (name, arguments) == ("clock", {})


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_parsed_into_the_clients_own_class(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.parse(**{**ASK, "seed": seed}, response_format=Drawing)
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Drawing)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 10


def test_each_choice_follows_the_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**ASK, n=4, response_format=Drawing)
    assert len({repr(choice.message.parsed) for choice in answer.choices}) > 1
    assert all(isinstance(choice.message.parsed, Drawing) for choice in answer.choices)


def test_a_stream_follows_the_schema_too(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ASK, response_format=Drawing) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert len(deltas) > 2, "it comes in pieces"
    assert isinstance(final.message.parsed, Drawing)
    whole = client.chat.completions.parse(**ASK, response_format=Drawing)
    assert "".join(deltas) == whole.choices[0].message.content


def test_json_mode_gives_an_object_or_the_beginning_of_one(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            **{**ASK, "seed": seed}, response_format={"type": "json_object"}, max_tokens=60
        )
        content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert content is not None
        assert content.startswith("{")
        assert reason in ("stop", "length")
        if reason == "stop":
            assert isinstance(json.loads(content), dict)


def test_an_answer_cut_short_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**ASK, response_format=Drawing, max_tokens=5)


def test_log_probabilities_are_those_among_the_allowed_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        **ASK,
        response_format={"type": "json_schema", "json_schema": {"name": "one", "schema": {"const": "abc"}}},
        logprobs=True,
        top_logprobs=3,
    )
    assert answer.choices[0].message.content == '"abc"'
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    entries = logprobs.content or []
    assert "".join(entry.token for entry in entries) == '"abc"'
    assert all(sum(2.718281828459045**top.logprob for top in entry.top_logprobs) <= 1.0001 for entry in entries)


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_one_of_the_tools(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(**{**ASK, "seed": seed}, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    calls = calls_of(answer)
    assert calls
    for name, arguments in calls:
        check_call(name, arguments)


def test_without_parallel_calls_there_is_one(client: openai.OpenAI) -> None:
    # Biased to go on where it could.
    bias = {str(EOS): -100}
    answer = client.chat.completions.create(
        **{**ASK, "logit_bias": bias}, tools=[CLOCK], tool_choice="required", parallel_tool_calls=False
    )
    assert calls_of(answer) == [("clock", {})]
    many = client.chat.completions.create(
        **{**ASK, "logit_bias": bias}, tools=[CLOCK], tool_choice="required", max_tokens=300
    )
    assert many.choices[0].finish_reason == "length"


def test_a_named_function_is_called_once_in_each_choice(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    answer = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice=named, n=3)
    ids = set()
    for choice in range(3):
        ((name, arguments),) = calls_of(answer, choice)
        assert name == "weather"
        Weather.model_validate(arguments)
        ids |= {call.id for call in answer.choices[choice].message.tool_calls or []}
    assert len(ids) == 3


def test_calls_are_parsed_into_the_clients_own_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**ASK, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_a_streamed_call_is_that_of_the_whole_answer(client: openai.OpenAI) -> None:
    ask = {**ASK, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    found: list[tuple[str, str]] = []
    reasons: list[str] = []
    chunks: list[ChatCompletionChunk] = list(
        client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        for choice in chunk.choices:
            assert not choice.delta.content
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                found.append((call.function.name or "", call.function.arguments or ""))
            reasons += [choice.finish_reason] if choice.finish_reason else []
    whole = client.chat.completions.create(**ask)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls_of(whole)
    assert reasons == ["tool_calls"]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_left_free_a_model_may_answer_in_text(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(**ASK, tools=TOOLS, max_tokens=12)
    none = client.chat.completions.create(**ASK, tools=TOOLS, tool_choice="none", max_tokens=12)
    assert free.choices[0].message.tool_calls is None
    assert free.choices[0].message.content == none.choices[0].message.content
    untold = client.chat.completions.create(**ASK, max_tokens=1)
    assert free.usage is not None
    assert none.usage is not None
    assert untold.usage is not None
    assert free.usage.prompt_tokens == none.usage.prompt_tokens > untold.usage.prompt_tokens


def test_tools_and_a_response_format_leave_the_model_the_choice(client: openai.OpenAI, backend: EngineBackend) -> None:
    both = {**ASK, "tools": TOOLS}
    # `{` and `<` are the two ways to begin.
    for letter, is_call in (("{", False), ("<", True)):
        bias = {str(EOS): 8, **{str(int(token_id)): 60 for token_id in backend.tokenize(letter)}}
        parsed = client.chat.completions.parse(**{**both, "logit_bias": bias}, response_format=Drawing)
        (choice,) = parsed.choices
        assert bool(choice.message.tool_calls) is is_call
        assert isinstance(choice.message.parsed, Drawing) is not is_call
    neither = client.chat.completions.parse(**{**both, "tool_choice": "none"}, response_format=Drawing)
    assert isinstance(neither.choices[0].message.parsed, Drawing)


def test_a_call_and_its_result_are_the_next_prompts_front(client: openai.OpenAI, backend: EngineBackend) -> None:
    ask = {**ASK, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    first = client.chat.completions.create(**ask)
    said = len(backend.prompts[-1]) + len(backend.answers[-1][0])
    (call,) = first.choices[0].message.tool_calls or []
    turns = [
        USER,
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"},
    ]
    second = client.chat.completions.create(**{**ask, "messages": turns})
    assert calls_of(second)
    text = backend.decode_tokens(backend.prompts[-1].tolist())
    assert "<tool_response>\n20 degrees\n</tool_response>" in text
    assert second.usage is not None
    details = second.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens >= said - 1, "all but the last token, which was never computed"


def test_a_bad_schema_is_a_bad_request(client: openai.OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "odd", "schema": {"type": "odd"}}}
    with pytest.raises(
        openai.BadRequestError, match="Invalid schema for response_format 'odd': Invalid type: odd"
    ) as e:
        client.chat.completions.create(**ASK, response_format=schema)
    assert (e.value.param, e.value.code) == ("response_format.json_schema.schema", "invalid_json_schema")
    # It is no error where no answer is held to it.
    odd: Any = {"type": "function", "function": {"name": "odd", "parameters": {"type": "odd"}}}
    client.chat.completions.create(**ASK, tools=[odd], max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="Invalid schema for function 'odd'"):
        client.chat.completions.create(**ASK, tools=[odd], tool_choice="required")


def test_text_as_a_format_is_no_format(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**ASK, max_tokens=8)
    asked = client.chat.completions.create(**ASK, max_tokens=8, response_format={"type": "text"})
    assert plain.choices[0].message.content == asked.choices[0].message.content
