"""From a backend's token batches to OpenAI's chat answer, whole or as a stream of chunks.

Where the answer may call tools, text that may be a call is held back to the end of its choice, and each call comes in
one piece. Both ways close the batches' generator when they end, for whatever reason. Never looks at the request.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from serving.chat_schema import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChosenLogprob,
    ChunkChoice,
    Delta,
    TopLogprob,
)
from serving.choices import ChoiceLedger, GatheredChoice, gather_choices
from serving.http_edge import sse_event
from serving.openai_schema import CompletionUsage
from serving.protocol import TokenBatch, TokenLogprob
from serving.tool_calls import ToolCall, ToolReader
from serving.tool_schema import DeltaToolCall, MessageToolCall
from serving.vocabulary import TokenPiece

DONE = sse_event(b"[DONE]")

LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a token that is as good as impossible: JSON has no infinity."""

PieceOf = Callable[[int], TokenPiece]
NewReader = Callable[[int], ToolReader]
Part = tuple[Delta, Sequence[TokenLogprob], str | None]
"""Of a stream: what is new, its log-probabilities, the finish reason."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What all parts of one answer have in common."""

    id: str
    created: int
    model: str
    piece_of: PieceOf
    num_choices: int = 1
    with_logprobs: bool = False
    new_reader: NewReader | None = None
    """What parts a choice's text into content and tool calls, by the choice's number; None: it can't have calls."""

    async def collect(self, batches: AsyncGenerator[TokenBatch, None]) -> ChatCompletion:
        """The whole answer at once. Raises AnswerCutShort if the batches end without an end."""
        choices, usage = await gather_choices(batches, self.num_choices)
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
            usage=CompletionUsage.of(usage),
        )

    async def events(
        self, batches: AsyncGenerator[TokenBatch, None], include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events.

        Of each choice: role, text as it comes, finish reason. Then the usage if asked for, and the end. The first
        event waits for the first batch. Raises AnswerCutShort if the batches end without an end.
        """
        ledger = ChoiceLedger(self.num_choices)
        readers = [None if self.new_reader is None else self.new_reader(i) for i in range(self.num_choices)]
        async with aclosing(batches):
            async for batch in batches:
                is_first = ledger.note(batch)
                for delta, logprobs, finish_reason in self._deltas(batch, is_first, readers[batch.choice]):
                    yield self._chunk(batch.choice, delta, logprobs, finish_reason, include_usage)
        usage = ledger.total()
        if include_usage:
            yield self._usage_chunk(CompletionUsage.of(usage))
        yield DONE

    def _deltas(self, batch: TokenBatch, is_first: bool, reader: ToolReader | None) -> list[Part]:
        deltas: list[Part] = []
        text, calls = _read(reader, batch.text, is_last=batch.finish_reason is not None)
        if is_first:
            deltas.append((Delta(role="assistant", content="", refusal=None), (), None))
        if text or batch.logprobs:
            deltas.append((Delta(content=text), batch.logprobs, None))
        if calls:
            deltas.append((Delta(tool_calls=[DeltaToolCall.at(i, call) for i, call in enumerate(calls)]), (), None))
        if batch.finish_reason is not None:
            deltas.append((Delta(), (), _finish_reason(batch.finish_reason, calls)))
        return deltas

    def _choice(self, index: int, choice: GatheredChoice) -> Choice:
        reader = None if self.new_reader is None else self.new_reader(index)
        text, calls = _read(reader, choice.text, is_last=True)
        message = AnswerMessage(role="assistant", content=text, refusal=None)
        if calls:
            called = {"content": text or None, "tool_calls": [MessageToolCall.of(call) for call in calls]}
            message = message.model_copy(update=called)
        return Choice(
            index=index,
            message=message,
            logprobs=self._logprobs(choice.logprobs) if self.with_logprobs else None,
            finish_reason=_finish_reason(choice.finish_reason, calls),
        )

    def _chunk(
        self,
        index: int,
        delta: Delta,
        logprobs: Sequence[TokenLogprob],
        finish_reason: str | None,
        include_usage: bool,
    ) -> bytes:
        choice = ChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(logprobs) if logprobs else None,
            finish_reason=finish_reason,
        )
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

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChoiceLogprobs:
        return ChoiceLogprobs(content=[self._chosen(one) for one in logprobs], refusal=None)

    def _chosen(self, one: TokenLogprob) -> ChosenLogprob:
        piece = self.piece_of(one.token_id)
        return ChosenLogprob(
            token=piece.text,
            logprob=finite_logprob(one.logprob),
            bytes=list(piece.data),
            top_logprobs=[self._top(token_id, logprob) for token_id, logprob in one.top],
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        piece = self.piece_of(token_id)
        return TopLogprob(token=piece.text, logprob=finite_logprob(logprob), bytes=list(piece.data))


def finite_logprob(logprob: float) -> float:
    """`logprob` as JSON can say it."""
    return max(logprob, LOWEST_LOGPROB)


def _read(reader: ToolReader | None, text: str, *, is_last: bool) -> tuple[str, tuple[ToolCall, ...]]:
    """The content in the next piece of a choice's text, and its tool calls, which come with the last one."""
    if reader is None:
        return text, ()
    content = reader.push(text)
    if not is_last:
        return content, ()
    rest, calls = reader.finish()
    return content + rest, calls


def _finish_reason(reason: str, calls: Sequence[ToolCall]) -> str:
    return "tool_calls" if calls and reason == "stop" else reason
