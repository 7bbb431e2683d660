"""The choices of one answer: several prompts' batches in one stream, and what has become of each choice.

    prompt 0: choice 0, 1 | prompt 1: choice 0, 1        as the backend counts them
              0, 1                    2, 3               as the answer does, prompt after prompt

Never looks at requests or schemas.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from serving.protocol import TokenBatch, TokenLogprob, Usage


async def merged(
    streams: Sequence[AsyncGenerator[TokenBatch, None]], num_choices: int
) -> AsyncGenerator[TokenBatch, None]:
    """The batches of prompts of `num_choices` choices each, as they come, their choices counted through.

    All streams run at once. When one fails the others are closed and its error comes out; when this generator is
    closed, so are they.
    """
    arrived: asyncio.Queue[TokenBatch | asyncio.Task[None]] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[TokenBatch, None], first_choice: int) -> None:
        async with aclosing(stream):
            async for batch in stream:
                arrived.put_nowait(replace(batch, choice=first_choice + batch.choice))

    tasks = [asyncio.create_task(pump(stream, i * num_choices)) for i, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    num_open = len(tasks)
    try:
        while num_open:
            event = await arrived.get()
            if isinstance(event, TokenBatch):
                yield event
            else:
                event.result()
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class AnswerCutShort(RuntimeError):
    """The batches ended before every choice had its finish reason, or without any usage."""


@dataclass
class ChoiceLedger:
    """What has come for each of `num_prompts * num_choices` choices."""

    num_choices: int = 1
    """Of each prompt."""
    num_prompts: int = 1
    started: set[int] = field(default_factory=set)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usages: dict[int, Usage] = field(default_factory=dict)

    def note(self, batch: TokenBatch) -> bool:
        """Take down what `batch` says of its choice. True if it is the choice's first."""
        is_first = batch.choice not in self.started
        self.started.add(batch.choice)
        if batch.finish_reason is not None:
            self.finish_reasons[batch.choice] = batch.finish_reason
        if batch.usage is not None:
            self.usages[batch.choice] = batch.usage
        return is_first

    def total(self) -> Usage:
        """The usage of all. Raises AnswerCutShort if a choice has no end or nothing has a usage."""
        missing = set(range(self.num_prompts * self.num_choices)) - self.finish_reasons.keys()
        if missing:
            raise AnswerCutShort(f"the batches ended without a finish reason for choices {sorted(missing)}")
        if not self.usages:
            raise AnswerCutShort("the batches ended without any usage")
        return total_usage(self.usages, self.num_choices)


@dataclass
class GatheredChoice:
    """One choice, whole."""

    finish_reason: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)


async def gather_choices(
    batches: AsyncGenerator[TokenBatch, None], num_choices: int, num_prompts: int = 1
) -> tuple[list[GatheredChoice], Usage]:
    """All choices in order, and what they cost together. Closes `batches`. Raises AnswerCutShort."""
    ledger = ChoiceLedger(num_choices, num_prompts)
    choices = [GatheredChoice() for _ in range(num_choices * num_prompts)]
    async with aclosing(batches):
        async for batch in batches:
            ledger.note(batch)
            choices[batch.choice].texts.append(batch.text)
            choices[batch.choice].logprobs.extend(batch.logprobs)
    usage = ledger.total()
    for index, choice in enumerate(choices):
        choice.finish_reason = ledger.finish_reasons[index]
    return choices, usage


def total_usage(usages: Mapping[int, Usage], num_choices: int) -> Usage:
    """One usage from the choices' own, by choice, of prompts with `num_choices` each.

    A prompt counts once, as its first choice found it: the others share its blocks. Every choice's tokens count.
    """
    by_prompt: dict[int, Usage] = {}
    for choice, usage in sorted(usages.items()):
        prompt = choice // num_choices
        first = by_prompt.get(prompt)
        by_prompt[prompt] = usage if first is None else _with_another_choice(first, usage)
    prompts = list(by_prompt.values())
    return Usage(
        prompt_tokens=sum(one.prompt_tokens for one in prompts),
        completion_tokens=sum(one.completion_tokens for one in prompts),
        device_tokens=sum(one.device_tokens for one in prompts),
        dram_tokens=sum(one.dram_tokens for one in prompts),
        disk_tokens=sum(one.disk_tokens for one in prompts),
        remote_tokens=sum(one.remote_tokens for one in prompts),
        prefill_tokens=sum(one.prefill_tokens for one in prompts),
        decode_computed_tokens=sum(one.decode_computed_tokens for one in prompts),
        load_s=sum(one.load_s for one in prompts),
        ttft_s=min(one.ttft_s for one in prompts),
        saved_s=sum(one.saved_s for one in prompts),
        reason="; ".join(dict.fromkeys(one.reason for one in prompts)),
        plan=prompts[0].plan if len(prompts) == 1 else None,
    )


def _with_another_choice(first: Usage, other: Usage) -> Usage:
    return replace(first, completion_tokens=first.completion_tokens + other.completion_tokens)
