"""The older completions endpoint, seen by the official client."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion

from serving.protocol import SamplingParams
from tests.serving.http_server import ENDLESS, TEXT, TEXT_BODY, WAIT_S, ScriptedBackend, client_of, serving

ANSWER = "Hello, wörld"


@pytest.fixture(scope="module")
def official() -> Iterator[openai.OpenAI]:
    with serving(ScriptedBackend()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("prompt", "token_ids", "echoes"),
    [
        ("one two three", [[3, 3, 5]], ["one two three"]),
        (["one", "three"], [[3], [5]], ["one", "three"]),
        ([7, 8], [[7, 8]], ["<7><8>"]),
        ([[7], [8, 9]], [[7], [8, 9]], ["<7>", "<8><9>"]),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_prompts_of_every_shape_are_answered_and_echoed(
    prompt: Any, token_ids: list[list[int]], echoes: list[str], stream: bool
) -> None:
    backend = ScriptedBackend()
    texts = [""] * len(echoes) * 2
    with serving(backend) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as official:
        answer: Any = official.completions.create(model="tiny", prompt=prompt, n=2, echo=True, stream=stream)
        for part in answer if stream else [answer]:
            for choice in part.choices:
                texts[choice.index] += choice.text
    assert texts == [echo + ANSWER for echo in echoes for _ in range(2)]
    assert sorted(call["token_ids"] for call in backend.calls) == token_ids
    assert len({call["request_id"] for call in backend.calls}) == len(token_ids)
    assert {call["num_choices"] for call in backend.calls} == {2}


def test_usage_is_the_sum_over_prompts(official: openai.OpenAI) -> None:
    whole = official.completions.create(model="tiny", prompt=["one", "two three"], n=2)
    Completion.model_validate(whole.model_dump(), strict=True)
    assert (whole.object, whole.created, whole.model) == ("text_completion", 42, "tiny")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 12)
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(official.completions.create(model="tiny", prompt=["one", "two three"], n=2, **options))
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert sorted(choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason) == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_have_the_older_shape(official: openai.OpenAI, stream: bool) -> None:
    told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    answer: Any = official.completions.create(**TEXT_BODY, logprobs=2, stream=stream)
    for part in answer if stream else [answer]:
        for choice in part.choices:
            for key in told:
                told[key] += getattr(choice.logprobs, key) if choice.logprobs else []
    assert told == {
        "tokens": ["Hello", ", ", "wörld"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"Hello": -0.5, ", ": -1.5}, {", ": -0.5, "wörld": -1.5}, {"wörld": -0.5, "<4>": -1.5}],
        "text_offset": [0, 5, 7],
    }


def test_what_the_client_says_reaches_the_backend() -> None:
    backend = ScriptedBackend()
    with client_of(backend) as client:
        said = {"temperature": 0, "seed": 5, "ignore_eos": True, "tokenloft": {"cache": False}, "logprobs": 0}
        client.post(TEXT, json={**TEXT_BODY, **said}, headers={"x-session-id": "s-1"}).raise_for_status()
        client.post(TEXT, json={"model": "tiny", "prompt": ["a", "a"]}).raise_for_status()
        client.post(TEXT, json={"model": "tiny", "prompt": "w " * 60}).raise_for_status()
    told, first, second, long = backend.calls
    assert told["sampling"] == SamplingParams(16, temperature=0.0, seed=5, ignore_eos=True, num_logprobs=0)
    assert (told["session_id"], told["use_cache"]) == ("s-1", False)
    assert first["sampling"].seed != second["sampling"].seed
    assert long["sampling"].max_tokens == 4


def test_a_client_that_hangs_up_ends_the_work_on_every_prompt() -> None:
    backend = ScriptedBackend(script=ENDLESS)
    with client_of(backend) as client:
        sent = {"model": "tiny", "prompt": ["one", "two"], "stream": True}
        with client.stream("POST", TEXT, json=sent) as response:
            assert next(response.iter_lines())
        assert backend.closed.wait(WAIT_S)
        in_flight = 'tokenloft_http_requests_in_flight{endpoint="/v1/completions"} 0.0'
        assert any(in_flight in client.get("/metrics").text for _ in range(100))
