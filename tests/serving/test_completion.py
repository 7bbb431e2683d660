import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serving.completion import DONE, Completion
from serving.protocol import TokenBatch, Usage

HEAD = Completion("chatcmpl-1", 17, "tiny")
END = TokenBatch((3,), "!", "stop", Usage(prompt_tokens=4, completion_tokens=3, dram_tokens=3))


async def batches_of(*batches: TokenBatch) -> AsyncGenerator[TokenBatch, None]:
    for batch in batches:
        yield batch


def chunks_of(include_usage: bool, *batches: TokenBatch) -> list[dict[str, Any]]:
    async def collect() -> list[bytes]:
        return [event async for event in HEAD.events(batches_of(*batches), include_usage)]

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
