import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from serving.completion import DONE, Completion
from serving.protocol import TokenBatch, TokenLogprob, Usage
from serving.tool_calls import ToolReader
from serving.vocabulary import TokenPiece

PIECES = [TokenPiece(b"Hi"), TokenPiece("é".encode()[:1]), TokenPiece("é".encode()[1:]), TokenPiece(b"!")]
HEAD = Completion("chatcmpl-1", 17, "tiny", PIECES.__getitem__)
END = TokenBatch((3,), "!", "stop", Usage(prompt_tokens=4, completion_tokens=3, dram_tokens=3))


async def batches_of(*batches: TokenBatch) -> AsyncGenerator[TokenBatch, None]:
    for batch in batches:
        yield batch


def chunks_of(include_usage: bool, *batches: TokenBatch, head: Completion = HEAD) -> list[dict[str, Any]]:
    async def collect() -> list[bytes]:
        return [event async for event in head.events(batches_of(*batches), include_usage)]

    events = asyncio.run(collect())
    assert events[-1] == DONE == b"data: [DONE]\n\n"
    assert all(event.startswith(b"data: ") and event.endswith(b"\n\n") for event in events)
    return [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]


def test_a_stream_is_role_text_finish_reason_in_the_exact_shape() -> None:
    role, text, last_text, finish = chunks_of(False, TokenBatch((1, 2), "Hi\nthere"), END)
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 17, "model": "tiny"}

    def choice(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}

    assert role == choice({"role": "assistant", "content": "", "refusal": None})
    assert text == choice({"content": "Hi\nthere"})
    assert last_text == choice({"content": "!"})
    assert finish == choice({}, "stop")


def test_usage_is_null_on_all_chunks_but_the_last() -> None:
    *others, last = chunks_of(True, TokenBatch((1, 2), "Hi"), END)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 7
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


def test_a_batch_without_text_makes_no_chunk() -> None:
    silent = TokenBatch((1,), "")
    assert chunks_of(False, silent, silent, END) == chunks_of(False, END)


def test_the_whole_answer_has_every_required_key() -> None:
    whole = asyncio.run(HEAD.collect(batches_of(TokenBatch((1, 2), "Hi"), END)))
    answer = json.loads(whole.as_json())
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert {"id", "object", "created", "model", "choices", "usage"} == set(answer)


@pytest.mark.parametrize("batches", [(), (TokenBatch((1,), "Hi"),)])
def test_an_answer_without_an_end_is_an_error(batches: tuple[TokenBatch, ...]) -> None:
    with pytest.raises(RuntimeError, match="without a finish reason"):
        asyncio.run(HEAD.collect(batches_of(*batches)))
    with pytest.raises(RuntimeError, match="without a finish reason"):
        chunks_of(False, *batches)


def test_a_stream_that_is_closed_half_way_closes_the_batches() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncGenerator[TokenBatch, None]:
        try:
            while True:
                yield TokenBatch((1,), "more")
        finally:
            closed.append(True)

    async def main() -> None:
        events = HEAD.events(endless(), include_usage=False)
        await anext(events)
        await events.aclose()
        assert closed == [True]

    asyncio.run(main())


def test_choices_are_streamed_as_they_come_and_each_has_its_role_and_end() -> None:
    head = Completion("chatcmpl-1", 17, "tiny", PIECES.__getitem__, num_choices=2)
    batches = (TokenBatch((1,), "b", choice=1), TokenBatch((0,), "a"), replace(END, choice=1), END)
    chunks = chunks_of(True, *batches, head=head)
    told = [
        (choice["index"], choice["delta"], choice["finish_reason"]) for chunk in chunks for choice in chunk["choices"]
    ]
    role = {"role": "assistant", "content": "", "refusal": None}
    assert told == [
        (1, role, None), (1, {"content": "b"}, None), (0, role, None), (0, {"content": "a"}, None),
        (1, {"content": "!"}, None), (1, {}, "stop"), (0, {"content": "!"}, None), (0, {}, "stop"),
    ]  # fmt: skip
    assert (chunks[-1]["usage"]["prompt_tokens"], chunks[-1]["usage"]["completion_tokens"]) == (4, 6)
    whole = json.loads(asyncio.run(head.collect(batches_of(*batches))).as_json())
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["a!", "b!"]
    assert whole["usage"] == chunks[-1]["usage"]


def test_log_probabilities_name_tokens_and_their_bytes() -> None:
    head = Completion("chatcmpl-1", 17, "tiny", PIECES.__getitem__, with_logprobs=True)
    logprobs = (TokenLogprob(0, -0.5, ((0, -0.5), (1, -1.5))), TokenLogprob(1, float("-inf")))
    # Half a character is held back: its tokens are told before its text.
    batches = (TokenBatch((0, 1), "Hi", logprobs=logprobs), TokenBatch((2,), "", logprobs=logprobs[:1]), END)
    first, second = (
        {
            "token": "Hi",
            "logprob": -0.5,
            "bytes": [72, 105],
            "top_logprobs": [
                {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
                {"token": "\ufffd", "logprob": -1.5, "bytes": [0xC3]},
            ],
        },
        {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xC3], "top_logprobs": []},
    )
    whole = json.loads(asyncio.run(head.collect(batches_of(*batches))).as_json())
    assert whole["choices"][0]["logprobs"] == {"content": [first, second, first], "refusal": None}
    choices = [chunk["choices"][0] for chunk in chunks_of(False, *batches, head=head)]
    assert [choice["logprobs"] and choice["logprobs"]["content"] for choice in choices] == [
        None, [first, second], [first], None, None,
    ]  # fmt: skip
    assert [choice["delta"].get("content") for choice in choices] == ["", "Hi", "", "!", None]


CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def with_tools() -> Completion:
    return replace(HEAD, new_reader=lambda choice: ToolReader(frozenset({"f"}), f"id{choice}_", accepts_bare=True))


def test_a_tool_call_comes_in_one_piece_at_the_end_of_the_stream() -> None:
    batches = (TokenBatch((1,), "Well.\n<tool"), TokenBatch((2,), CALL_TEXT[5:-1]), replace(END, text=">"))
    role, text, call, finish = chunks_of(False, *batches, head=with_tools())
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert text["choices"][0]["delta"] == {"content": "Well."}
    (called,) = call["choices"][0]["delta"]["tool_calls"]
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert called == {"index": 0, "id": "id0_0", "type": "function", "function": function}
    assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "tool_calls")


@pytest.mark.parametrize(("text", "content"), [("", None), ("Well.\n", "Well.")])
def test_a_whole_answer_has_its_tool_calls_beside_its_content(text: str, content: str | None) -> None:
    batches = batches_of(TokenBatch((1, 2), text + CALL_TEXT), replace(END, text=""))
    (choice,) = json.loads(asyncio.run(with_tools().collect(batches)).as_json())["choices"]
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": content,
        "refusal": None,
        "tool_calls": [{"id": "id0_0", "type": "function", "function": function}],
    }


def test_a_call_that_was_cut_short_is_content_and_so_is_everything_without_calls() -> None:
    cut = (TokenBatch((1,), CALL_TEXT[:-20]), replace(END, text="", finish_reason="length"))
    for batches, reason in ((cut, "length"), ((TokenBatch((1, 2), "Hi"), END), "stop")):
        (choice,) = json.loads(asyncio.run(with_tools().collect(batches_of(*batches))).as_json())["choices"]
        text = "".join(batch.text for batch in batches)
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert choice["finish_reason"] == reason
        deltas = [chunk["choices"][0] for chunk in chunks_of(False, *batches, head=with_tools())]
        assert "".join(choice["delta"].get("content", "") for choice in deltas) == text
        assert deltas[-1]["finish_reason"] == reason


def test_log_probabilities_are_told_of_held_back_text_too() -> None:
    logprob = TokenLogprob(1, -0.5)
    batches = (TokenBatch((1,), CALL_TEXT, logprobs=(logprob,)), replace(END, text="", logprobs=(logprob,)))
    chunks = chunks_of(False, *batches, head=replace(with_tools(), with_logprobs=True))
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum(len(one["content"]) for one in told if one) == 2
