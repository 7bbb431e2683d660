"""Turns the token ids of one answer into text, piece by piece.

The pieces joined are the text of all tokens decoded at once, special tokens left out, up to the first stop
string that is complete when the answer may end. Text is held back while it may still change (an incomplete
character) or may be the start of a stop string. Each token costs two short decodes however long the answer is:
only a small window is decoded.

    ids     ... sent ...  [ context ][ fresh ]     context: sent already, decoded again because decoders treat
                          [       window     ]     the first token of a text differently (a stripped space)
"""

from typing import Protocol

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that are no character, or not yet."""

MAX_INCOMPLETE_CHARS = 3
"""An incomplete UTF-8 character is at most three bytes, and shows as one to three replacement characters."""

MAX_FRESH_TOKENS = 16
"""Replacement characters at the end are held back for so many tokens: some decoders turn a whole run of bytes into
them while its last character is incomplete. What is longer is no text but broken bytes, and is let go."""


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class IncrementalDetokenizer:
    """Text of one answer, as it grows."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        """A stop string that is complete before the answer has `min_tokens` tokens is text like other text."""
        self._tokenizer = tokenizer
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._context: list[int] = []
        self._fresh: list[int] = []
        self._num_sent_chars = 0
        """Characters of the window's text that went on already, the context's included."""
        self._stop = StopMatcher(stop)

    def __repr__(self) -> str:
        return f"<IncrementalDetokenizer fresh={len(self._fresh)} stopped={self._stop.is_stopped}>"

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that the token made certain, and whether a stop string was reached.

        After a stop string nothing more comes out.
        """
        self._num_tokens += 1
        # Special tokens are left out here, not by the decoder, so that one at the window's edge
        # can't make the next token look like the first of the text.
        if token_id in self._special_ids or self._stop.is_stopped:
            return "", self._stop.is_stopped
        self._fresh.append(token_id)
        text = self._decode(self._context + self._fresh)
        is_broken = len(self._fresh) > MAX_FRESH_TOKENS
        certain = _without_replacements_at_end(text, MAX_INCOMPLETE_CHARS if is_broken else len(text))
        delta = certain[self._num_sent_chars :]
        self._num_sent_chars = max(self._num_sent_chars, len(certain))
        if not text.endswith(REPLACEMENT):
            self._context, self._fresh = self._fresh, []
            self._num_sent_chars = len(self._decode(self._context))
        elif is_broken:
            self._cut_window(text)
        return self._stop.push(delta, may_stop=self._may_stop), self._stop.is_stopped

    def finish(self) -> str:
        """The text held back until now: call it once, after the last token."""
        rest = self._decode(self._context + self._fresh)[self._num_sent_chars :]
        return self._stop.push(rest, may_stop=self._may_stop) + self._stop.finish()

    @property
    def _may_stop(self) -> bool:
        return self._num_tokens >= self._min_tokens

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _cut_window(self, text: str) -> None:
        """Shorten a window that ends in broken bytes, where both sides decode alone to what they do together.

        Then nothing that follows can join them: the right side, which is not empty, has settled the left.
        """
        window = self._context + self._fresh
        for num_right in range(1, MAX_INCOMPLETE_CHARS + 2):
            left = self._decode(window[:-num_right])
            if len(left) <= self._num_sent_chars and left + self._decode(window[-num_right:]) == text:
                self._context, self._fresh = [], window[-num_right:]
                self._num_sent_chars -= len(left)
                return


class StopMatcher:
    """Passes text on until a stop string is complete, which is left out with all that follows.

    The stop string that is complete first counts, the longest of those that end together: so the result does
    not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(sorted((text for text in stop if text), key=len, reverse=True))
        self._held = ""
        self.is_stopped = False

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """The text that is now sure to be before any stop string.

        With `may_stop` false no stop string is complete in this piece, but one may begin in it.
        """
        if self.is_stopped:
            return ""
        num_old, text = len(self._held), self._held + text
        self._held = ""
        start = self._first_stop(text, num_old) if may_stop else None
        if start is not None:
            self.is_stopped = True
            return text[:start]
        num_held = self._num_held(text)
        certain = text[: len(text) - num_held]
        self._held = text[len(certain) :]
        return certain

    def finish(self) -> str:
        """The text held back, which turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str, num_old: int) -> int | None:
        """Where the first stop string starts that is complete only behind the first `num_old` characters."""
        starts = ((stop, text.find(stop, max(0, num_old + 1 - len(stop)))) for stop in self._stop)
        ends = [(at + len(stop), at) for stop, at in starts if at >= 0]
        return min(ends)[1] if ends else None

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string starts with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _without_replacements_at_end(text: str, max_removed: int) -> str:
    num_removed = min(len(text) - len(text.rstrip(REPLACEMENT)), max_removed)
    return text[: len(text) - num_removed]
