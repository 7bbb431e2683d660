"""Batches cross from an engine's thread into the event loop: in order, none lost, gathered under load."""

import asyncio
import threading
from contextlib import ExitStack

import pytest

from serving.protocol import TokenBatch, TokenLogprob, Usage
from serving.token_stream import Pace, TokenStream, merge

LAST = TokenBatch((), "", "stop", Usage(1, 1))


def batch(token_id: int) -> TokenBatch:
    return TokenBatch((token_id,), f"{token_id} ")


async def collect(stream: TokenStream) -> list[TokenBatch]:
    return [each async for each in stream]


def test_merging_keeps_order_and_the_last_word() -> None:
    usage = Usage(3, 2)
    merged = merge([batch(1), TokenBatch((2, 3), ""), TokenBatch((4,), "end", "length", usage)])
    assert merged == [TokenBatch((1, 2, 3, 4), "1 end", "length", usage)]
    assert merge([batch(7)]) == [batch(7)]


def test_merging_keeps_log_probabilities_beside_their_tokens() -> None:
    first, second, third = (TokenLogprob(token_id, -float(token_id), ((0, -0.5),)) for token_id in (1, 2, 3))
    (merged,) = merge(
        [TokenBatch((1,), "a", logprobs=(first,)), TokenBatch((2, 3), "b", "stop", logprobs=(second, third))]
    )
    assert merged == TokenBatch((1, 2, 3), "ab", "stop", logprobs=(first, second, third))


def test_merging_keeps_choices_apart_and_the_very_last_batch_last() -> None:
    batches = [
        TokenBatch((1,), "a", choice=0),
        TokenBatch((2,), "b", choice=1),
        TokenBatch((3,), "c", "stop", choice=0),
        TokenBatch((4,), "d", choice=2),
        TokenBatch((5,), "e", "length", choice=1),
    ]
    assert merge(batches) == [
        TokenBatch((1, 3), "ac", "stop", choice=0),
        TokenBatch((4,), "d", choice=2),
        TokenBatch((2, 5), "be", "length", choice=1),
    ]


def test_the_first_batch_comes_at_once_and_what_piles_up_comes_together() -> None:
    async def scenario() -> None:
        stream = TokenStream(Pace(0.05, 0.05))
        batches = aiter(stream)
        stream.push(batch(0))
        # Would wait for good if the first needed company.
        assert await asyncio.wait_for(anext(batches), 10) == batch(0)
        for token_id in (1, 2, 3):
            stream.push(batch(token_id))
        assert await anext(batches) == TokenBatch((1, 2, 3), "1 2 3 ")
        stream.push(batch(4))
        stream.push(LAST)
        assert await anext(batches) == TokenBatch((4,), "4 ", "stop", LAST.usage)
        with pytest.raises(StopAsyncIteration):
            await anext(batches)

    asyncio.run(scenario())


def test_all_may_be_there_before_anybody_reads() -> None:
    async def scenario() -> list[TokenBatch]:
        stream = TokenStream(Pace())
        stream.push(batch(1))
        stream.push(LAST)
        await asyncio.sleep(0)
        return await collect(stream)

    assert asyncio.run(scenario()) == [TokenBatch((1,), "1 ", "stop", LAST.usage)]


def test_a_stream_ends_when_every_choice_has() -> None:
    async def scenario() -> list[TokenBatch]:
        stream = TokenStream(Pace(0.0, 0.0), num_choices=3)
        for choice in (1, 0, 2):
            stream.push(TokenBatch((choice,), "", choice=choice))
            await asyncio.sleep(0)
            stream.push(TokenBatch((7,), "", "stop", choice=choice))
        return await asyncio.wait_for(collect(stream), 10)

    received = asyncio.run(scenario())
    ends = [each.choice for each in received if each.finish_reason]
    assert ends == [1, 0, 2]
    for choice in range(3):
        assert [t for each in received if each.choice == choice for t in each.token_ids] == [choice, 7]


@pytest.mark.parametrize("reason", ["error", "lost"])
def test_a_failure_ends_the_stream_of_all_choices(reason: str) -> None:
    async def scenario() -> list[TokenBatch]:
        stream = TokenStream(Pace(0.0, 0.0), num_choices=2)
        stream.push(batch(1))
        stream.push(TokenBatch((), "it failed", reason, choice=1))
        return await asyncio.wait_for(collect(stream), 10)

    assert [each.finish_reason for each in asyncio.run(scenario())] == [None, reason]


@pytest.mark.parametrize("interval_s", [0.0, 0.001])
def test_nothing_is_lost_between_threads(interval_s: float) -> None:
    num_tokens = 5000

    async def scenario() -> list[TokenBatch]:
        stream = TokenStream(Pace(interval_s, interval_s))

        def produce() -> None:
            for token_id in range(num_tokens):
                stream.push(batch(token_id))
            stream.push(LAST)

        producer = threading.Thread(target=produce)
        producer.start()
        received = await asyncio.wait_for(collect(stream), 60)
        producer.join()
        return received

    received = asyncio.run(scenario())
    assert [token_id for each in received for token_id in each.token_ids] == list(range(num_tokens))
    assert [each.finish_reason for each in received if each.finish_reason] == ["stop"]


def test_the_interval_limits_how_many_batches_cross() -> None:
    async def scenario() -> list[TokenBatch]:
        stream = TokenStream(Pace(0.1, 0.1))

        async def produce() -> None:
            for token_id in range(50):
                stream.push(batch(token_id))
                await asyncio.sleep(0.001)
            stream.push(LAST)

        producer = asyncio.create_task(produce())
        received = await collect(stream)
        await producer
        return received

    received = asyncio.run(scenario())
    assert received[0] == batch(0)
    assert len(received) < 25


def test_a_push_after_the_loop_has_ended_is_lost_quietly() -> None:
    async def make() -> TokenStream:
        return TokenStream(Pace())

    stream = asyncio.run(make())
    stream.push(batch(1))


def test_more_streams_are_further_apart_up_to_a_limit() -> None:
    pace = Pace(0.02, 0.1, max_batches_per_s=50)
    seen = [pace.interval_s]
    with ExitStack() as streams:
        for _ in range(8):
            streams.enter_context(pace.stream())
            seen.append(pace.interval_s)
    assert seen == pytest.approx([0.02, 0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1, 0.1])
    assert pace.interval_s == pytest.approx(0.02)


def test_the_end_does_not_wait() -> None:
    async def scenario() -> None:
        stream = TokenStream(Pace(3600.0, 3600.0))
        batches = aiter(stream)
        stream.push(batch(0))
        assert await anext(batches) == batch(0)
        stream.push(batch(1))
        stream.push(LAST)
        last = await asyncio.wait_for(anext(batches), 10)
        assert last.token_ids == (1,)
        assert last.finish_reason == "stop"
        with pytest.raises(StopAsyncIteration):
            await anext(batches)

    asyncio.run(scenario())
