"""A tokenizer's tokens, one by one: ids of a text, and the bytes that an id stands for.

A token is bytes, not text: a character may be spread over several. `TokenPiece.text` shows such a part as a
replacement character; `data` is exact. How ids become bytes is read from the tokenizer's own decoder: byte-level
vocabularies spell each byte as a letter, SentencePiece ones write spaces as an underline and lone bytes as `<0xE2>`.
Never imports FastAPI or pydantic.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from cache.hashing import TokenIds, as_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>", re.ASCII)
_SENTENCEPIECE_SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """One token by itself."""

    data: bytes
    """UTF-8, perhaps only a part of a character."""
    is_special: bool = False
    """Not part of an answer's text."""

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


class TokenMark(IntEnum):
    """What a token means for how text is cut into tokens."""

    PLAIN = 0
    LINE_END = 1
    """Its text ends with a line break, behind which tokenizers seldom join."""
    SPECIAL = 2
    """Never joined with anything, and no part of an answer's text."""


class Vocabulary:
    """The ids that a model knows. May be called from several threads."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", num_embeddings: int | None = None) -> None:
        """`num_embeddings`: rows of the model's own table, where that is known; ids behind them are not its ids."""
        self._tokenizer = tokenizer
        highest = max(tokenizer.get_vocab().values())
        self.size: int = highest + 1 if num_embeddings is None else min(highest + 1, num_embeddings)
        """Ids from 0 up to this one, exclusive, may be in a prompt."""
        self.lock = threading.Lock()
        """Fast tokenizers keep padding and truncation as mutable state and raise when two threads meet there."""
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._spell = _speller(tokenizer)

    def tokenize(self, text: str) -> TokenIds:
        """Token ids of `text`, `(num_tokens,)`, with what the tokenizer itself puts around a prompt."""
        with self.lock:
            return as_token_ids(cast(list[int], self._tokenizer.encode(text, add_special_tokens=True)))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`, all of them shown, special ones too."""
        text = self._tokenizer.decode(
            [int(one) for one in token_ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return cast(str, text)

    def piece(self, token_id: int) -> TokenPiece:
        """The token by itself; no bytes for an id that the tokenizer does not know."""
        if token_id in self._added:
            return TokenPiece(self._added[token_id].encode("utf-8"), token_id in self._special_ids)
        token = cast(str | None, self._tokenizer.convert_ids_to_tokens(token_id))
        return TokenPiece(b"" if token is None else self._spell(token), token_id in self._special_ids)

    def marks(self) -> npt.NDArray[np.int8]:
        """The `TokenMark` of every id, `(size,)`. Takes about a second for 300,000 ids: ask once."""
        pieces = (self.piece(token_id) for token_id in range(self.size))
        marks = (_mark(piece) for piece in pieces)
        return np.fromiter(marks, np.int8, self.size)

    def __repr__(self) -> str:
        return f"Vocabulary(size={self.size})"


def _mark(piece: TokenPiece) -> TokenMark:
    if piece.is_special:
        return TokenMark.SPECIAL
    return TokenMark.LINE_END if piece.data.endswith(b"\n") else TokenMark.PLAIN


def _speller(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], bytes]:
    """How the tokenizer's decoder turns a token of its vocabulary into bytes."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    decoder: Any = None if backend is None else backend.decoder
    kinds = _decoder_kinds({} if decoder is None else json.loads(decoder.__getstate__()))
    if "ByteLevel" in kinds:
        byte_of = _byte_level_alphabet()
        return lambda token: b"".join(byte_of.get(letter) or letter.encode("utf-8") for letter in token)
    if kinds & {"ByteFallback", "Metaspace"}:
        return _spell_sentencepiece
    return lambda token: token.encode("utf-8")


def _decoder_kinds(decoder: dict[str, Any]) -> set[str]:
    parts: list[dict[str, Any]] = decoder.get("decoders", [])
    return {decoder.get("type", "")}.union(*(_decoder_kinds(part) for part in parts))


def _spell_sentencepiece(token: str) -> bytes:
    lone = _LONE_BYTE.fullmatch(token)
    return bytes([int(lone[1], 16)]) if lone else token.replace(_SENTENCEPIECE_SPACE, " ").encode("utf-8")


def _byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's letters for bytes: printable Latin-1 is itself, the other bytes follow each other from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return letters | {chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)}
