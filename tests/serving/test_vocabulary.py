import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serving.vocabulary import TokenMark, TokenPiece, Vocabulary


def byte_level() -> PreTrainedTokenizerFast:
    """One token per byte, one special token and one that is only added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool é>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")  # type: ignore[no-untyped-call]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Words with an underline for their space, and bytes to fall back to."""
    words = ["<unk>", "\u2581hello", "\u2581", "world"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # type: ignore[no-untyped-call]


def id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes() -> None:
    vocabulary = Vocabulary(byte_level())
    every_byte = bytes(range(256)).decode("latin-1") + " né\n\t€ 🙂"
    pieces = [vocabulary.piece(int(token_id)) for token_id in vocabulary.tokenize(every_byte)]
    assert b"".join(piece.data for piece in pieces) == every_byte.encode()
    assert not any(piece.is_special for piece in pieces)


def test_a_part_of_a_character_shows_as_a_replacement() -> None:
    vocabulary = Vocabulary(byte_level())
    first, second = (vocabulary.piece(int(token_id)) for token_id in vocabulary.tokenize("é"))
    assert (first.text, second.text) == ("\ufffd", "\ufffd")
    assert (first.data + second.data).decode() == "é"


def test_added_tokens_are_spelt_as_they_are() -> None:
    tokenizer = byte_level()
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.piece(id_of(tokenizer, "<tool é>")) == TokenPiece("<tool é>".encode())
    assert vocabulary.piece(tokenizer.eos_token_id) == TokenPiece(b"<|end|>", is_special=True)


@pytest.mark.parametrize(
    ("token", "data"), [("\u2581hello", b" hello"), ("world", b"world"), ("<0xE2>", b"\xe2"), ("<0x0A>", b"\n")]
)
def test_sentencepieces_spaces_and_bytes(token: str, data: bytes) -> None:
    tokenizer = sentencepiece()
    assert Vocabulary(tokenizer).piece(id_of(tokenizer, token)) == TokenPiece(data)


def test_ids_are_those_of_tokenizer_and_model() -> None:
    tokenizer = byte_level()
    highest = max(tokenizer.get_vocab().values())
    assert Vocabulary(tokenizer).size == highest + 1
    assert Vocabulary(tokenizer, num_embeddings=10_000).size == highest + 1
    assert Vocabulary(tokenizer, num_embeddings=100).size == 100


def test_an_unknown_id_has_no_bytes() -> None:
    vocabulary = Vocabulary(byte_level())
    assert vocabulary.piece(vocabulary.size + 5) == TokenPiece(b"")


def test_marks_say_where_lines_and_text_end() -> None:
    tokenizer = byte_level()
    vocabulary = Vocabulary(tokenizer)
    marks = vocabulary.marks()
    assert marks.shape == (vocabulary.size,)
    (line_end,) = vocabulary.tokenize("\n").tolist()
    expected = {tokenizer.eos_token_id: TokenMark.SPECIAL, line_end: TokenMark.LINE_END}
    assert {i: mark for i, mark in enumerate(marks.tolist()) if mark != TokenMark.PLAIN} == expected
    assert Vocabulary(tokenizer, num_embeddings=100).marks().shape == (100,)


def test_text_to_ids_and_back_with_special_tokens_shown() -> None:
    vocabulary = Vocabulary(byte_level())
    token_ids = vocabulary.tokenize("a <|end|> b")
    assert token_ids.dtype == np.int32
    assert vocabulary.decode(token_ids.tolist()) == "a <|end|> b"
    assert len(vocabulary.tokenize("")) == 0
