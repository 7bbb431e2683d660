import asyncio
from collections.abc import AsyncGenerator

import pytest

from serving.choices import AnswerCutShort, ChoiceLedger, gather_choices, merged, total_usage
from serving.protocol import LoadPlan, TokenBatch, TokenLogprob, Usage


async def batches_of(*batches: TokenBatch) -> AsyncGenerator[TokenBatch, None]:
    for batch in batches:
        await asyncio.sleep(0)
        yield batch


def end(choice: int, reason: str = "stop") -> TokenBatch:
    return TokenBatch((), "", reason, Usage(10, 2), choice)


def test_choices_are_counted_through_prompt_after_prompt() -> None:
    async def main() -> list[TokenBatch]:
        streams = [batches_of(TokenBatch((1,), "a", choice=1), end(0)), batches_of(TokenBatch((2,), "b"), end(1))]
        return [batch async for batch in merged(streams, num_choices=2)]

    batches = asyncio.run(main())
    assert sorted((batch.choice, batch.text) for batch in batches) == [(0, ""), (1, "a"), (2, "b"), (3, "")]


def test_prompts_run_at_once() -> None:
    async def main() -> None:
        first_came = asyncio.Event()

        async def waits() -> AsyncGenerator[TokenBatch, None]:
            await first_came.wait()
            yield end(0)

        async def goes() -> AsyncGenerator[TokenBatch, None]:
            first_came.set()
            yield end(0)

        async with asyncio.timeout(10):
            assert len([batch async for batch in merged([waits(), goes()], 1)]) == 2

    asyncio.run(main())


@pytest.mark.parametrize("ending", ["error", "closed"])
def test_all_streams_are_closed_with_the_answer(ending: str) -> None:
    closed: list[int] = []

    async def endless(number: int) -> AsyncGenerator[TokenBatch, None]:
        try:
            while True:
                yield TokenBatch((1,), "x")
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            closed.append(number)

    async def fails() -> AsyncGenerator[TokenBatch, None]:
        yield TokenBatch((1,), "x")
        raise LookupError("lost")

    async def main() -> None:
        streams = [endless(0), endless(1), *([fails()] if ending == "error" else [])]
        batches = merged(streams, 1)
        if ending == "closed":
            await anext(batches)
            await batches.aclose()
        else:
            with pytest.raises(LookupError, match="lost"):
                await gather_choices(batches, 1, 3)
        assert sorted(closed) == [0, 1]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_gathering_keeps_choices_apart_and_in_order() -> None:
    logprob = TokenLogprob(1, -0.5)
    batches = batches_of(
        TokenBatch((1,), "b", choice=1, logprobs=(logprob,)),
        TokenBatch((1,), "a"),
        end(1, "length"),
        TokenBatch((2,), "A"),
        end(0),
    )
    (first, second), usage = asyncio.run(gather_choices(batches, 2))
    assert (first.text, first.finish_reason, first.logprobs) == ("aA", "stop", [])
    assert (second.text, second.finish_reason, second.logprobs) == ("b", "length", [logprob])
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 4)


def test_an_answer_needs_an_end_of_every_choice_and_a_usage() -> None:
    ledger = ChoiceLedger(num_choices=2)
    assert ledger.note(end(0))
    with pytest.raises(AnswerCutShort, match=r"without a finish reason for choices \[1\]"):
        ledger.total()
    assert ledger.note(TokenBatch((), "x", choice=1))
    assert not ledger.note(TokenBatch((), "", "stop", choice=1))
    assert ledger.total().completion_tokens == 2
    with pytest.raises(AnswerCutShort, match="without any usage"):
        ChoiceLedger(finish_reasons={0: "stop"}).total()


def test_a_prompt_counts_once_and_as_its_first_choice_found_it() -> None:
    cold = Usage(10, 3, decode_computed_tokens=10, load_s=0.5, ttft_s=0.9, saved_s=0.0, reason="least loaded")
    shared = Usage(10, 4, device_tokens=9, decode_computed_tokens=1, load_s=0.1, ttft_s=1.0, saved_s=2.0)
    plan = LoadPlan("load", 20, 0, 0.2)
    warm = Usage(20, 5, disk_tokens=20, load_s=0.25, ttft_s=0.2, saved_s=3.0, reason="longest match", plan=plan)
    total = total_usage({3: shared, 1: shared, 0: cold, 2: warm}, num_choices=2)
    assert total == Usage(
        prompt_tokens=30,
        completion_tokens=16,
        disk_tokens=20,
        decode_computed_tokens=10,
        load_s=0.75,
        ttft_s=0.2,
        saved_s=3.0,
        reason="least loaded; longest match",
    )
    assert total.cached_tokens + total.prefill_tokens + total.decode_computed_tokens == total.prompt_tokens
    assert total_usage({0: cold}, 1) == cold
    assert total_usage({0: warm}, 1) == warm
