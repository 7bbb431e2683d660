from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from serving.engine.detokenizer import MAX_FRESH_TOKENS, IncrementalDetokenizer, StopMatcher
from tests.tiny_models import VOCAB_SIZE, build_tokenizer

TOKENIZER: Any = build_tokenizer()


def build_sentencepiece_tokenizer() -> Any:
    """The other kind: spaces as `▁`, the text's first one stripped, unknown characters as single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s", "▁", "é"]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


SENTENCEPIECE: Any = build_sentencepiece_tokenizer()


def decode(token_ids: list[int], tokenizer: Any = TOKENIZER) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def run(token_ids: list[int], stop: tuple[str, ...] = (), tokenizer: Any = TOKENIZER) -> tuple[list[str], bool]:
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    deltas, stopped = [], False
    for token_id in token_ids:
        delta, stopped = detokenizer.push(token_id)
        deltas.append(delta)
        if stopped:
            break
    deltas.append(detokenizer.finish())
    return deltas, stopped


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The definition: the first prefix that ends with a stop string, without the longest such."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(st.text(max_size=40))
@example("👩‍👩‍👧 family, naïve café, 你好世界")
@example("\ufffd and \ufffd\ufffd\ufffd\ufffd\ufffd")
def test_pieces_join_to_the_text(text: str) -> None:
    token_ids = TOKENIZER.encode(text)
    deltas, _ = run(token_ids)
    assert "".join(deltas) == decode(token_ids)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=80))
@example([TOKENIZER.convert_tokens_to_ids("Ģ")] * 100)  # one hundred times byte 0x80, which starts nothing
def test_pieces_of_any_tokens_join_to_their_text(token_ids: list[int]) -> None:
    deltas, _ = run(token_ids)
    assert "".join(deltas) == decode(token_ids)


def test_incomplete_characters_are_held_back() -> None:
    token_ids = TOKENIZER.encode("a😀")
    deltas, _ = run(token_ids)
    assert len(token_ids) > 2
    assert [delta for delta in deltas if delta] == ["a", "😀"]


def test_text_comes_out_token_by_token() -> None:
    token_ids = TOKENIZER.encode("the cat and the hen")
    deltas, _ = run(token_ids)
    assert deltas == [*(decode([token_id]) for token_id in token_ids), ""]


def test_special_tokens_are_skipped() -> None:
    token_ids = [1, *TOKENIZER.encode("hi"), 2, *TOKENIZER.encode(" there")]
    deltas, _ = run(token_ids)
    assert "".join(deltas) == "hi there"


def test_broken_bytes_do_not_make_the_window_grow() -> None:
    longest = 0

    class Counting:
        """The real tokenizer, which also notes how much it is asked to decode."""

        all_special_ids: list[int] = TOKENIZER.all_special_ids

        def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
            nonlocal longest
            longest = max(longest, len(token_ids))
            return decode(token_ids)

    byte = TOKENIZER.convert_tokens_to_ids("Ģ")
    deltas, _ = run([byte] * 300, tokenizer=Counting())
    assert "".join(deltas) == "\ufffd" * 300
    assert longest <= 2 * MAX_FRESH_TOKENS


SENTENCEPIECE_TOKENS = SENTENCEPIECE.convert_tokens_to_ids(["▁the", "▁cat", "s", "▁", "é", "<s>"])


@given(
    st.lists(
        st.sampled_from([[token] for token in SENTENCEPIECE_TOKENS])
        | st.sampled_from("€😀ü").map(lambda c: [3 + byte for byte in c.encode()]),
        max_size=20,
    )
)
def test_decoders_that_strip_the_first_space(pieces: list[list[int]]) -> None:
    token_ids = [token for piece in pieces for token in piece]
    deltas, _ = run(token_ids, tokenizer=SENTENCEPIECE)
    assert "".join(deltas) == decode(token_ids, SENTENCEPIECE)


@given(
    text=st.text(alphabet="ab😀 ", max_size=25),
    stop=st.lists(st.text(alphabet="ab😀 ", min_size=1, max_size=4), max_size=4).map(tuple),
)
@example(text="aab", stop=("ab",))
@example(text="abab", stop=("abb", "ba"))
def test_text_ends_before_the_first_stop_string(text: str, stop: tuple[str, ...]) -> None:
    deltas, stopped = run(TOKENIZER.encode(text), stop)
    assert ("".join(deltas), stopped) == cut_at_stop(text, stop)


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=6), max_size=8),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_stop_strings_are_found_however_the_text_is_cut(pieces: list[str], stop: tuple[str, ...]) -> None:
    matcher = StopMatcher(stop)
    out = "".join([matcher.push(piece) for piece in pieces])
    is_stopped = matcher.is_stopped
    out += matcher.finish()
    assert (out, is_stopped) == cut_at_stop("".join(pieces), stop)


def test_the_start_of_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(("\n\nUser:",))
    assert matcher.push("fine.\n") == "fine."
    assert matcher.push("\nUse") == ""
    assert matcher.push("d") == "\n\nUsed"
    assert matcher.push("\n\nUser: hi") == ""
    assert matcher.is_stopped
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


def test_nothing_comes_after_a_stop_string() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, ("cat",))
    pushed = [detokenizer.push(token) for token in TOKENIZER.encode("the cat and")]
    assert "".join(delta for delta, _ in pushed) == "the "
    assert pushed[-1] == ("", True)
    assert detokenizer.finish() == ""
    assert repr(detokenizer) == "<IncrementalDetokenizer fresh=0 stopped=True>"


@pytest.mark.parametrize("stop", [(), ("",)])
def test_no_stop_string_holds_nothing_back(stop: tuple[str, ...]) -> None:
    assert StopMatcher(stop).push("text") == "text"


def ends_at(pieces: list[str], stop: tuple[str, ...], min_pieces: int) -> tuple[str, bool]:
    """The definition: a stop string counts if its last character is in piece number `min_pieces` or a later one."""
    text = "".join(pieces)
    num_before = len("".join(pieces[: max(0, min_pieces - 1)]))
    for end in range(num_before + 1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=8),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3).map(tuple),
    min_pieces=st.integers(0, 9),
)
@example(pieces=["a", "b", "x"], stop=("b", "abc"), min_pieces=3)
@example(pieces=["aa", "a"], stop=("aa",), min_pieces=2)
def test_stop_strings_that_are_complete_too_early_are_text(
    pieces: list[str], stop: tuple[str, ...], min_pieces: int
) -> None:
    matcher = StopMatcher(stop)
    out = "".join([matcher.push(piece, may_stop=at >= min_pieces) for at, piece in enumerate(pieces, 1)])
    is_stopped = matcher.is_stopped
    out += matcher.finish()
    assert (out, is_stopped) == ends_at(pieces, stop, min_pieces)


@given(text=st.text(alphabet="ab ", max_size=25), min_tokens=st.integers(0, 30))
@example(text="abab", min_tokens=2)
def test_an_answer_does_not_stop_before_min_tokens(text: str, min_tokens: int) -> None:
    token_ids, stop = TOKENIZER.encode(text), ("ab", " b")
    detokenizer = IncrementalDetokenizer(TOKENIZER, stop, min_tokens)
    pushed = [detokenizer.push(token_id) for token_id in token_ids]
    expected, is_stopped = ends_at([decode([token_id]) for token_id in token_ids], stop, min_tokens)
    assert any(stopped for _, stopped in pushed) is is_stopped
    assert "".join(delta for delta, _ in pushed) + detokenizer.finish() == expected


def test_special_tokens_count_for_min_tokens() -> None:
    cat = TOKENIZER.encode("the cat")
    for num_special, is_stopped in ((0, False), (3, True)):
        detokenizer = IncrementalDetokenizer(TOKENIZER, ("cat",), min_tokens=len(cat) + 3)
        pushed = [detokenizer.push(token_id) for token_id in [1] * num_special + cat]
        assert pushed[-1][1] is is_stopped
