from typing import Any

import pytest
from pydantic import ValidationError

from serving.text_schema import CompletionRequest, TextPrompt


def parse(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "hello", **fields})


@pytest.mark.parametrize(
    ("sent", "prompts"),
    [
        ("hi", ["hi"]),
        (["hi", "you"], ["hi", "you"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["x"] * 32, ["x"] * 32),
    ],
)
def test_a_prompt_has_four_shapes(sent: object, prompts: list[TextPrompt]) -> None:
    assert parse(prompt=sent).prompt == prompts


@pytest.mark.parametrize("sent", ["", [], [""], [[]], [None], [1, "x"], ["x", 1], [[1], "x"], ["x"] * 33])
def test_others_are_refused(sent: object) -> None:
    with pytest.raises(ValidationError):
        parse(prompt=sent)


def test_prompts_are_named_as_the_client_would() -> None:
    assert parse(prompt=[1, 2]).name_of_prompt(0) == "prompt"
    assert parse(prompt=["a", "b"]).name_of_prompt(1) == "prompt[1]"


def test_logprobs_is_a_number_and_0_is_not_none() -> None:
    assert parse().num_logprobs is None
    assert parse(logprobs=0).num_logprobs == 0
    assert parse(logprobs=20).sampling(7, 11).num_logprobs == 20


@pytest.mark.parametrize(
    ("param", "value", "neutral"),
    [
        ("suffix", "end", ""),
        ("best_of", 2, 1),
        ("response_format", {"type": "json_object"}, {"type": "text"}),
        ("add_special_tokens", False, True),
        ("length_penalty", 2.0, 1),
    ],
)
def test_what_we_cannot_do_is_refused_unless_it_asks_for_nothing(param: str, value: object, neutral: object) -> None:
    assert parse(**{param: value}).unsupported_parameter() == param
    assert parse(**{param: neutral}).unsupported_parameter() is None


def test_best_of_as_many_as_wanted_leaves_none_out() -> None:
    assert parse(n=3, best_of=3).unsupported_parameter() is None
    assert parse(n=3, best_of=1).unsupported_parameter() == "best_of"
