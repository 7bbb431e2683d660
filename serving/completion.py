"""From a backend's token batches to OpenAI's answer, whole or as a stream of chunks.

Both ways close the batches' generator when they end, for whatever reason. Never looks at the request.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from serving.http_edge import sse_event
from serving.openai_schema import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    CompletionUsage,
    Delta,
)
from serving.protocol import TokenBatch

DONE = sse_event(b"[DONE]")


@dataclass(frozen=True, slots=True)
class Completion:
    """What all parts of one answer have in common."""

    id: str
    created: int
    model: str

    async def collect(self, batches: AsyncGenerator[TokenBatch, None]) -> ChatCompletion:
        """The whole answer at once. Raises RuntimeError if the batches end without an end."""
        texts: list[str] = []
        finish_reason, usage = None, None
        async with aclosing(batches):
            async for batch in batches:
                texts.append(batch.text)
                finish_reason, usage = batch.finish_reason, batch.usage
        if finish_reason is None or usage is None:
            raise _cut_short(self.id)
        message = AnswerMessage(role="assistant", content="".join(texts), refusal=None)
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[Choice(index=0, message=message, logprobs=None, finish_reason=finish_reason)],
            usage=CompletionUsage.of(usage),
        )

    async def events(
        self, batches: AsyncGenerator[TokenBatch, None], include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events: role, text as it comes, finish reason, usage if asked for, done.

        The first event waits for the first batch. Raises RuntimeError if the batches end without an end.
        """
        finish_reason, usage, is_started = None, None, False
        async with aclosing(batches):
            async for batch in batches:
                if not is_started:
                    yield self._chunk(Delta(role="assistant", content="", refusal=None), None, include_usage)
                    is_started = True
                if batch.text:
                    yield self._chunk(Delta(content=batch.text), None, include_usage)
                finish_reason, usage = batch.finish_reason, batch.usage
        if finish_reason is None or usage is None:
            raise _cut_short(self.id)
        yield self._chunk(Delta(), finish_reason, include_usage)
        if include_usage:
            yield self._usage_chunk(CompletionUsage.of(usage))
        yield DONE

    def _chunk(self, delta: Delta, finish_reason: str | None, include_usage: bool) -> bytes:
        choice = ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)
        chunk = ChatCompletionChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=[choice]
        )
        # Where usage was asked for, every chunk but the last says null; otherwise none has the key.
        return sse_event((chunk.model_copy(update={"usage": None}) if include_usage else chunk).as_json())

    def _usage_chunk(self, usage: CompletionUsage) -> bytes:
        chunk = ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=[],
            usage=usage,
        )
        return sse_event(chunk.as_json())


def _cut_short(completion_id: str) -> RuntimeError:
    return RuntimeError(f"the batches of {completion_id} ended without a finish reason and usage")
