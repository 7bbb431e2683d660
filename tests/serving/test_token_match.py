import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.hashing import as_token_ids
from serving.token_match import last_meeting

HALF, REST = b"\xc3", b"\xa9"
"""Together an e with an accent."""


def meeting(said: Sequence[bytes], rendered: Sequence[bytes]) -> tuple[int, int]:
    """The last meeting of tokens that are given as their bytes."""
    tokens = sorted({*said, *rendered})
    left, right = ([tokens.index(token) for token in side] for side in (said, rendered))
    return last_meeting(as_token_ids(left), as_token_ids(right), tokens.__getitem__)


def words(text: str) -> list[bytes]:
    return [word.encode() for word in text.split("|")]


@pytest.mark.parametrize(
    ("said", "rendered", "expected"),
    [
        ("a|b", "a|b", (2, 2)),
        ("a|b", "a|b|c", (2, 2)),
        ("a|b|c", "a|b", (2, 2)),
        ("a|b", "ab|c", (2, 1)),
        ("ab|c", "a|b|c|d", (2, 3)),
        ("a|\n|\n", "a|\n\n|b", (3, 2)),
        ("the| c|at", "the| cat", (3, 2)),
        ("the| c|at", "the| cats", (1, 1)),
        ("the| c|at", "the| cow", (1, 1)),
        ("x|y", "a|b", (0, 0)),
        ("ab|cd|ef", "a|bc|de|f|g", (3, 4)),
        ("ab|cd|e", "a|bc|de|f", (3, 3)),
        ("ab|cd|ez", "a|bc|de|f", (0, 0)),
        ("é", "é|x", (1, 1)),
    ],
)
def test_last_meeting(said: str, rendered: str, expected: tuple[int, int]) -> None:
    assert meeting(words(said), words(rendered)) == expected


def test_nothing_meets_nothing() -> None:
    assert meeting([], [b"a"]) == meeting([b"a"], []) == meeting([], []) == (0, 0)


def test_a_character_in_two_tokens_meets_one_that_is_whole() -> None:
    assert meeting([b"a", HALF, REST, b"b"], [b"a" + HALF + REST, b"b"]) == (4, 2)
    assert meeting([b"a", HALF, REST, b"b"], [b"a", HALF + REST, b"b"]) == (4, 3)
    assert meeting([HALF + REST, b"c"], [HALF, REST + b"c"]) == (2, 2)


def test_there_is_no_meeting_in_the_middle_of_a_character() -> None:
    assert meeting([b"ab", HALF], [b"a", b"b" + HALF + REST]) == (0, 0)
    assert meeting([b"a", b"b", HALF, b"x"], [b"ab", HALF + REST]) == (2, 1)


def test_broken_bytes_meet_the_replacement_character_that_shows_them() -> None:
    shown = "\ufffd".encode()
    assert meeting([b"a", HALF, b"b"], [b"a", shown, b"b", b"c"]) == (3, 3)
    assert meeting([b"a", HALF], [b"a", shown + b"b"]) == (1, 1)
    # A character that was never finished, and one that was.
    assert meeting([b"a", HALF], [b"a", shown, b"b"]) == (2, 2)
    assert meeting([b"\xef"], [b"\xef", b"\xbf", b"\xbd", b"!"]) == (1, 3)
    assert meeting([b"a", HALF], [b"a", HALF + REST]) == (1, 1)
    assert meeting([b"a", HALF], [b"a", HALF, REST]) == (2, 2)
    # The first of its bytes may be the broken byte itself.
    assert meeting([b"\xef", b"!"], [b"\xef", b"\xbf", b"\xbd", b"!"]) == (2, 4)
    assert meeting([b"a\xef", b"\xbf", b"!"], [b"a\xef", b"\xbf", b"\xbd!"]) == (3, 3)
    assert meeting([b"\xff", b"\xff", b"z"], [shown + shown + b"z"]) == (3, 1)


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """The same bytes, cut into tokens twice."""
    data = draw(st.text(alphabet="ab\né🙂", max_size=30)).encode()
    places = st.sets(st.integers(1, max(1, len(data) - 1)))
    return cut(data, draw(places)), cut(data, draw(places))


def cut(data: bytes, places: set[int]) -> list[bytes]:
    ends = sorted({0, len(data)} | {place for place in places if place < len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


@given(two_cuts(), st.text(alphabet="abé", max_size=4))
def test_the_same_text_meets_at_its_end(cuts: tuple[list[bytes], list[bytes]], more: str) -> None:
    said, rendered = cuts
    following = [more.encode()] if more else []
    assert meeting(said, rendered + following) == (len(said), len(rendered))


@given(st.lists(st.sampled_from([b"a", b"b", b"ab", HALF, REST, b"\xff", "é".encode()])), st.data())
def test_what_lies_before_a_meeting_is_the_same_text(said: list[bytes], data: st.DataObject) -> None:
    rendered = data.draw(st.lists(st.sampled_from([b"a", b"b", b"ba", HALF + REST, "\ufffd".encode()])))
    num_said, num_rendered = meeting(said, rendered)
    texts = (b"".join(said[:num_said]), b"".join(rendered[:num_rendered]))
    assert texts[0].decode("utf-8", "replace") == texts[1].decode("utf-8", "replace")
