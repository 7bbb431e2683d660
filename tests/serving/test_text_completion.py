import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serving.completion import DONE
from serving.protocol import TokenBatch, TokenLogprob, Usage
from serving.text_completion import LogprobWriter, TextAnswer
from serving.vocabulary import TokenPiece

PIECES = [
    TokenPiece(b"Hi"),
    TokenPiece("é".encode()[:1]),
    TokenPiece("é".encode()[1:]),
    TokenPiece(b"!"),
    TokenPiece(b"<end>", is_special=True),
]


def head(**options: Any) -> TextAnswer:
    return TextAnswer("cmpl-1", 17, "tiny", PIECES.__getitem__, **options)


def end(choice: int = 0) -> TokenBatch:
    return TokenBatch((3,), "!", "stop", Usage(prompt_tokens=4, completion_tokens=3, dram_tokens=3), choice)


async def batches_of(*batches: TokenBatch) -> AsyncGenerator[TokenBatch, None]:
    for batch in batches:
        yield batch


def chunks_of(answer: TextAnswer, include_usage: bool, *batches: TokenBatch) -> list[dict[str, Any]]:
    async def collect() -> list[bytes]:
        return [event async for event in answer.events(batches_of(*batches), include_usage)]

    events = asyncio.run(collect())
    assert events[-1] == DONE
    return [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]


def whole_of(answer: TextAnswer, *batches: TokenBatch) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(asyncio.run(answer.collect(batches_of(*batches))).as_json())
    return whole


def test_the_whole_answer_has_every_required_key() -> None:
    answer = whole_of(head(), TokenBatch((0,), "Hi"), end())
    assert answer["choices"] == [{"index": 0, "text": "Hi!", "logprobs": None, "finish_reason": "stop"}]
    assert {"id", "object", "created", "model", "choices", "usage"} == set(answer)
    assert answer["usage"]["total_tokens"] == 7


def test_a_stream_is_text_and_a_finish_reason_in_the_exact_shape() -> None:
    same = {"id": "cmpl-1", "object": "text_completion", "created": 17, "model": "tiny"}
    text, finish = chunks_of(head(), False, TokenBatch((0,), "Hi"), TokenBatch((1,), ""), end())
    assert text == {**same, "choices": [{"index": 0, "text": "Hi", "logprobs": None, "finish_reason": None}]}
    assert finish == {**same, "choices": [{"index": 0, "text": "!", "logprobs": None, "finish_reason": "stop"}]}


def test_usage_is_null_on_all_chunks_but_the_last() -> None:
    *others, last = chunks_of(head(), True, TokenBatch((0,), "Hi"), end())
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 7)


def test_the_echo_goes_before_each_choice_of_its_prompt() -> None:
    answer = head(num_choices=2, num_prompts=2, echoes=("one ", "two "))
    batches = [TokenBatch((0,), "Hi", choice=choice) for choice in (3, 0, 2, 1)] + [end(choice) for choice in range(4)]
    assert [choice["text"] for choice in whole_of(answer, *batches)["choices"]] == ["one Hi!"] * 2 + ["two Hi!"] * 2
    texts = ["", "", "", ""]
    for chunk in chunks_of(answer, False, *batches):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["one Hi!"] * 2 + ["two Hi!"] * 2


def test_log_probabilities_are_lists_of_equal_length() -> None:
    logprobs = [TokenLogprob(i, -0.25 * i, ((3, -0.1), (0, -0.2))) for i in range(5)]
    batches = [
        TokenBatch((0,), "Hi", logprobs=tuple(logprobs[:2])),
        TokenBatch((2,), "é", logprobs=tuple(logprobs[2:])),
        end(),
    ]
    whole = whole_of(head(with_logprobs=True), *batches)["choices"][0]["logprobs"]
    assert whole == {
        "tokens": ["Hi", "\ufffd", "\ufffd", "!", "<end>"],
        "token_logprobs": [0, -0.25, -0.5, -0.75, -1],
        "top_logprobs": [
            {"!": -0.1, "Hi": -0.2},
            {"!": -0.1, "Hi": -0.2, "\ufffd": -0.25},
            {"!": -0.1, "Hi": -0.2, "\ufffd": -0.5},
            {"!": -0.1, "Hi": -0.2},
            {"!": -0.1, "Hi": -0.2, "<end>": -1},
        ],
        "text_offset": [0, 2, 2, 3, 4],
    }  # fmt: skip
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks_of(head(with_logprobs=True), False, *batches)]
    assert parts[-1] is None
    assert {key: parts[0][key] + parts[1][key] for key in whole} == whole


def test_an_impossible_token_has_a_number_all_the_same() -> None:
    written = LogprobWriter(PIECES.__getitem__).write([TokenLogprob(0, float("-inf"))])
    assert json.loads(written.as_json())["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize("batches", [(), (TokenBatch((1,), "Hi"),), (end(0),)])
def test_an_answer_without_an_end_of_every_choice_is_an_error(batches: tuple[TokenBatch, ...]) -> None:
    with pytest.raises(RuntimeError, match="without a finish reason"):
        whole_of(head(num_prompts=2), *batches)
    with pytest.raises(RuntimeError, match="without a finish reason"):
        chunks_of(head(num_prompts=2), False, *batches)
