"""Choices, log-probabilities and what agents send, seen by the official client."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serving.protocol import SamplingParams
from tests.serving.http_server import BODY, CHAT, ScriptedBackend, client_of, serving


@pytest.fixture(scope="module")
def official() -> Iterator[openai.OpenAI]:
    with serving(ScriptedBackend()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        yield client


def test_several_choices_come_whole(official: openai.OpenAI) -> None:
    whole = official.chat.completions.create(**BODY, n=3)
    ChatCompletion.model_validate(whole.model_dump(), strict=True)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert {choice.message.content for choice in whole.choices} == {"Hello, wörld"}
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 9, 12)


def test_several_choices_come_as_a_stream(official: openai.OpenAI) -> None:
    chunks = list(official.chat.completions.create(**BODY, n=2, stream=True, stream_options={"include_usage": True}))
    texts, roles, reasons = ["", ""], [0, 0], [0, 0]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role is not None
            reasons[choice.index] += choice.finish_reason is not None
    assert (texts, roles, reasons) == (["Hello, wörld"] * 2, [1, 1], [1, 1])
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 6)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_log_probabilities_are_told_whole_and_in_a_stream(official: openai.OpenAI) -> None:
    whole = official.chat.completions.create(**BODY, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert [entry.token for entry in content] == ["Hello", ", ", "wörld"]
    assert bytes(content[2].bytes or []).decode() == "wörld"
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("Hello", -0.5), (", ", -1.5)]

    streamed: list[Any] = []
    for chunk in official.chat.completions.create(**BODY, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            streamed += (choice.logprobs and choice.logprobs.content) or []
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in content]


def test_without_being_asked_for_there_are_no_log_probabilities(official: openai.OpenAI) -> None:
    assert official.chat.completions.create(**BODY).choices[0].logprobs is None
    whole = official.chat.completions.create(**BODY, logprobs=True)
    assert whole.choices[0].logprobs is not None
    assert [entry.top_logprobs for entry in whole.choices[0].logprobs.content or []] == [[], [], []]


def test_what_load_generators_send_is_understood() -> None:
    backend = ScriptedBackend()
    sent: dict[str, Any] = {
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "three"}]},
        ],
        "max_completion_tokens": 8,
        "min_tokens": 8,
        "ignore_eos": True,
        "n": 2,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
        "metadata": {"run": "1"},
        "an_unknown_field": [1],
    }
    with client_of(backend) as client:
        client.post(CHAT, json=sent).raise_for_status()
    (call,) = backend.calls
    assert (call["token_ids"], call["num_choices"]) == ([2, 5, 3, 5], 2)
    seed = call["sampling"].seed
    assert call["sampling"] == SamplingParams(8, seed=seed, min_tokens=8, ignore_eos=True)
