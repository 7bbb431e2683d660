"""Grammars that an answer must follow: checked, compiled, and kept in step with each sequence.

A grammar is text in llguidance's Lark dialect. It travels with the request; whatever else is here follows from it
and the tokens so far, so a turn goes on the same on another replica.

    HTTP edge   check_grammar        with one token per byte: the client hears of a bad grammar before anything runs
    engine      GrammarCompiler      a thread compiles, and keeps what it compiled
    sequence    Matcher              has read the answer so far; its thread computes the next token's mask meanwhile

The step loop never waits for a compilation. A mask takes tens of microseconds once the grammar's lexer is warm, and
is computed while the model is; one that is late even so delays its own sequence, not the others of the batch.
Never chooses a token, never knows schemas of requests. Does not import torch.
"""

import concurrent.futures
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

Mask = npt.NDArray[np.bool_]
"""Tokens that may come next, `(vocab_size,)`."""

MAX_COMPILED = 64
"""Grammars kept by an engine: the least recently used goes first."""

MASK_WAIT_S = 0.005
"""How long a step waits for masks that are not ready when the model is."""

IDLE_WAIT_S = 0.05
"""The same where nothing else could go on; those who arrive meanwhile wait as long."""

JSON_STYLE: Mapping[str, object] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
"""JSON as `json.dumps` and chat templates write it. With free white space, small models may never stop to indent."""

_NO_TEXT = "NoExtensionBias"
_SOURCE = re.compile(r"\n(?:<state>| *\d+ \|)")
_PLACE = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?")


class BadGrammar(ValueError):
    """No answer can follow this grammar: it is malformed, unsupported, too large, or contradicts itself."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """A rule's body: JSON text that `schema`, which is its own root for `$ref`, allows, in `JSON_STYLE`."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


def check_grammar(grammar: str) -> None:
    """Raise BadGrammar, with the reason, unless an answer can begin. Milliseconds; from any thread."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    _raise_error(matcher)


class GrammarCompiler:
    """Compiles grammars for one model's tokens, one at a time, in a thread of its own. `close` once at the end."""

    def __init__(
        self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int], max_compiled: int = MAX_COMPILED
    ) -> None:
        """`tokenizer` is transformers' own; `vocab_size` the number of logits.

        Reading the tokenizer takes up to a second and holds the interpreter, so it is done here, once.
        """
        self._vocab_size = vocab_size
        self._max_compiled = max_compiled
        self._tokenizer = _read_tokenizer(tokenizer, vocab_size, eos_token_ids)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        """Only the compiling thread touches it."""
        self._compiling = ThreadPoolExecutor(1, "tokenloft-grammar")
        self._masking = ThreadPoolExecutor(1, "tokenloft-masks")

    def __repr__(self) -> str:
        return f"<GrammarCompiler {len(self._compiled)} compiled>"

    def open(self, grammar: str, generated: Sequence[int] = ()) -> "Future[Matcher]":
        """A matcher behind the tokens of `generated`, its first mask ready. Fails with BadGrammar."""
        return self._compiling.submit(self._open, grammar, list(generated))

    def close(self) -> None:
        for pool in (self._compiling, self._masking):
            pool.shutdown(cancel_futures=True)

    def _open(self, grammar: str, generated: list[int]) -> "Matcher":
        matcher = self._compile(grammar).deep_copy()
        if not matcher.consume_tokens(generated):
            raise BadGrammar(f"the answer so far does not follow the grammar: {_reason(matcher)}")
        return Matcher(matcher, self._vocab_size, self._masking)

    def _compile(self, grammar: str) -> LLMatcher:
        compiled = self._compiled.get(grammar)
        if compiled is None:
            if self._tokenizer is None:
                raise BadGrammar("this model's tokenizer is of a kind that grammars can't be compiled for")
            compiled = LLMatcher(self._tokenizer, grammar, log_level=0)
            _raise_error(compiled)
            self._compiled[grammar] = compiled
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > self._max_compiled:
            self._compiled.popitem(last=False)
        return compiled


class Matcher:
    """One answer's place in its grammar. Belongs to one thread; only masks are computed in another."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, masking: Executor) -> None:
        self._matcher = matcher
        """Not to be touched while a mask is being computed: it would raise."""
        self._vocab_size = vocab_size
        self._masking = masking
        self.is_complete = False
        """The answer follows the grammar, and nothing but its end can come."""
        self.error: str | None = None
        """Why no answer can be had: the grammar has turned out too complex."""
        self._mask: Future[Mask] = Future()
        self._mask.set_result(self._compute_mask())

    def __repr__(self) -> str:
        return f"<Matcher is_complete={self.is_complete} error={self.error}>"

    @property
    def is_ready(self) -> bool:
        """`mask` can be read."""
        return self._mask.done()

    @property
    def mask(self) -> Mask:
        """Tokens that may come next; those that end the answer are among them where the grammar accepts it so far."""
        return self._mask.result()

    def accept(self, token_id: int) -> None:
        """The answer's next token, which the present mask allows. Begins to compute the next mask."""
        self._mask.result()
        if not self._matcher.consume_token(token_id) or self._matcher.is_error():
            self.error = _reason(self._matcher)
        elif self._matcher.is_stopped():
            self.is_complete = True
        else:
            self._mask = self._masking.submit(self._compute_mask)

    @staticmethod
    def wait(matchers: "Sequence[Matcher]", *, has_others: bool) -> None:
        """Wait until all masks are ready, or for as long as the step may.

        `has_others`: the step has parts that need none of them. Otherwise there is no hurry while none is ready.
        """
        late = {matcher._mask for matcher in matchers if not matcher.is_ready}
        if not late:
            return
        done, _ = concurrent.futures.wait(late, MASK_WAIT_S)
        if not has_others and not done and len(late) == len(matchers):
            concurrent.futures.wait(late, IDLE_WAIT_S, concurrent.futures.FIRST_COMPLETED)

    def _compute_mask(self) -> Mask:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)


def _read_tokenizer(tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> LLTokenizer | None:
    """None for the kinds that the library can't read."""
    try:
        size = max(vocab_size, len(tokenizer))
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(eos_token_ids) or None)
    except (TypeError, ValueError):
        return None


def _raise_error(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise BadGrammar(_reason(matcher))


def _reason(matcher: LLMatcher) -> str:
    """The library's own words, without its place in a text that nobody has written and its inner state."""
    words = _PLACE.sub("", _SOURCE.split(matcher.get_error(), maxsplit=1)[0])
    return "no text can satisfy it" if words.startswith(_NO_TEXT) else " ".join(words.split())
