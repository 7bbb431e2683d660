"""Where two runs of token ids that begin with the same text part.

    said       | the | _c | at | \n | \n |           a model chose these ids
    rendered   | the | _cat | \n\n | bye |           a tokenizer made these of the same text, and of what follows
               ^     ^      ^            meetings: places where both have a token's end and the same text before it

Up to its last meeting, `said` can stand for `rendered`: the text stays what it is, and what follows is encoded as the
tokenizer does it. Pure: knows tokens by their bytes alone.
"""

import codecs
from collections.abc import Callable

import numpy as np

from cache.hashing import TokenIds

DataOf = Callable[[int], bytes]
"""The bytes that a token id stands for, perhaps a part of a character."""

MAX_BEGUN = 3
"""Bytes of a character that is not whole, and so the tokens that may make them up."""


def last_meeting(said: TokenIds, rendered: TokenIds, data_of: DataOf) -> tuple[int, int]:
    """How many tokens of each lie before the last place where they meet; `(0, 0)` if their texts differ at once.

    Only tokens that differ are looked at one by one. Bytes that are no character count as the replacement character
    that they are shown as.
    """
    num_said = num_rendered = 0
    while True:
        num_same = _num_same(said[num_said:], rendered[num_rendered:])
        num_said, num_rendered = num_said + num_same, num_rendered + num_same
        # A character that has begun here may end in other bytes on either side, and yet be shown as the same.
        num_back = _num_begun(said[num_said - num_same : num_said], data_of)
        step = _next_meeting(said[num_said - num_back :], rendered[num_rendered - num_back :], data_of)
        if step is None:
            return num_said, num_rendered
        num_said, num_rendered = num_said + step[0] - num_back, num_rendered + step[1] - num_back


def _num_same(left: TokenIds, right: TokenIds) -> int:
    """Length of the common prefix, in ids."""
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length


def _num_begun(token_ids: TokenIds, data_of: DataOf) -> int:
    """How many tokens back, at most three, a character begins that is not whole at the end; 0 if all are whole."""
    data = b""
    for num_back in range(1, min(MAX_BEGUN, len(token_ids)) + 1):
        data = data_of(int(token_ids[-num_back])) + data
        decoder = _new_decoder()
        decoder.decode(data)
        if decoder.getstate()[0]:
            return num_back
        if data and not _is_continuation(data[0]):
            return 0
    return 0


def _new_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _is_continuation(byte: int) -> bool:
    return byte & 0xC0 == 0x80


class _Reader:
    """Reads tokens one by one as text that is still to be compared."""

    def __init__(self, token_ids: TokenIds, data_of: DataOf, *, ends: bool) -> None:
        """`ends`: a character that is not whole at the last token never will be, and shows as a replacement."""
        self._token_ids = token_ids
        self._data_of = data_of
        self._ends = ends
        self._decoder = _new_decoder()
        self.num_read = 0
        self.text = ""
        """Read, and not compared yet."""
        self.is_whole = True
        """What was read ends with a whole character."""

    def read(self) -> bool:
        """One more token; False if there is none."""
        if self.num_read == len(self._token_ids):
            return False
        data = self._data_of(int(self._token_ids[self.num_read]))
        self.num_read += 1
        is_last = self._ends and self.num_read == len(self._token_ids)
        self.text += self._decoder.decode(data, final=is_last)
        self.is_whole = not self._decoder.getstate()[0]
        return True


def _next_meeting(said: TokenIds, rendered: TokenIds, data_of: DataOf) -> tuple[int, int] | None:
    """Tokens of each up to the first meeting behind the start; None if there is none."""
    left, right = _Reader(said, data_of, ends=True), _Reader(rendered, data_of, ends=False)
    if not left.read():
        return None
    while left.text or right.text or not (left.is_whole and right.is_whole and right.num_read):
        # The one with less text goes on; of two with the same, the one in the middle of a character.
        is_left_behind = not left.text and (bool(right.text) or not left.is_whole)
        if not (left if is_left_behind else right).read():
            return None
        length = min(len(left.text), len(right.text))
        if left.text[:length] != right.text[:length]:
            return None
        left.text, right.text = left.text[length:], right.text[length:]
    return left.num_read, right.num_read
