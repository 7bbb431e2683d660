"""From a backend's token batches to OpenAI's older text completion, whole or as a stream of chunks.

Both ways close the batches' generator when they end, for whatever reason. Never looks at the request. Of several
prompts the choices are counted through, prompt after prompt.
"""

import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from serving.choices import ChoiceLedger, gather_choices
from serving.completion import DONE, PieceOf, finite_logprob
from serving.http_edge import sse_event
from serving.openai_schema import CompletionUsage
from serving.protocol import TokenBatch, TokenLogprob
from serving.text_schema import TextChoice, TextCompletion, TextLogprobs


@dataclass
class LogprobWriter:
    """Log-probabilities of one choice, in pieces: it remembers how much text went before."""

    piece_of: PieceOf
    _num_chars: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def write(self, logprobs: Sequence[TokenLogprob]) -> TextLogprobs:
        """The next tokens of the choice."""
        pieces = [self.piece_of(one.token_id) for one in logprobs]
        return TextLogprobs(
            tokens=[piece.text for piece in pieces],
            token_logprobs=[finite_logprob(one.logprob) for one in logprobs],
            top_logprobs=[self._top(one) for one in logprobs],
            text_offset=[self._pass(piece.data if not piece.is_special else b"") for piece in pieces],
        )

    def _pass(self, data: bytes) -> int:
        """Where the token of `data` begins, in characters."""
        start = self._num_chars
        self._num_chars += len(self._decoder.decode(data))
        return start

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        # Parts of characters look alike: the first, which is the likeliest, keeps the name.
        top: dict[str, float] = {}
        for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
            top.setdefault(self.piece_of(token_id).text, finite_logprob(logprob))
        return top


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """What all parts of one answer have in common."""

    id: str
    created: int
    model: str
    piece_of: PieceOf
    num_choices: int = 1
    """Of each prompt."""
    num_prompts: int = 1
    with_logprobs: bool = False
    echoes: Sequence[str] = ()
    """Text of each prompt, where it is to stand before its choices' own."""

    async def collect(self, batches: AsyncGenerator[TokenBatch, None]) -> TextCompletion:
        """The whole answer at once. Raises AnswerCutShort if the batches end without an end."""
        choices, usage = await gather_choices(batches, self.num_choices, self.num_prompts)
        return self._completion(
            [
                TextChoice(
                    index=index,
                    text=self._echo(index) + choice.text,
                    logprobs=LogprobWriter(self.piece_of).write(choice.logprobs) if self.with_logprobs else None,
                    finish_reason=choice.finish_reason,
                )
                for index, choice in enumerate(choices)
            ],
            usage=CompletionUsage.of(usage),
        )

    async def events(
        self, batches: AsyncGenerator[TokenBatch, None], include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events: text as it comes, with the choice's last the finish reason; usage; the end.

        The first event waits for the first batch. Raises AnswerCutShort if the batches end without an end.
        """
        ledger = ChoiceLedger(self.num_choices, self.num_prompts)
        writers = [LogprobWriter(self.piece_of) for _ in range(self.num_choices * self.num_prompts)]
        # Where usage was asked for, every chunk but the last says null; otherwise none has the key.
        usage_key: dict[str, None] = {"usage": None} if include_usage else {}
        async with aclosing(batches):
            async for batch in batches:
                echo = self._echo(batch.choice) if ledger.note(batch) else ""
                choice = self._chunk_choice(batch, echo, writers[batch.choice])
                if choice is not None:
                    yield sse_event(self._completion([choice], **usage_key).as_json())
        usage = ledger.total()
        if include_usage:
            yield sse_event(self._completion([], usage=CompletionUsage.of(usage)).as_json())
        yield DONE

    def _chunk_choice(self, batch: TokenBatch, echo: str, writer: LogprobWriter) -> TextChoice | None:
        """None if the batch has nothing to tell."""
        text = echo + batch.text
        if not (text or batch.logprobs or batch.finish_reason):
            return None
        return TextChoice(
            index=batch.choice,
            text=text,
            logprobs=writer.write(batch.logprobs) if batch.logprobs else None,
            finish_reason=batch.finish_reason,
        )

    def _echo(self, choice: int) -> str:
        return self.echoes[choice // self.num_choices] if self.echoes else ""

    def _completion(self, choices: list[TextChoice], **usage: CompletionUsage | None) -> TextCompletion:
        return TextCompletion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            **usage,
        )
