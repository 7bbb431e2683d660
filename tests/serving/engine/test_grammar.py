"""Grammars by themselves: what is refused and why, what masks allow, what is kept."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from serving.engine.grammar import BadGrammar, GrammarCompiler, check_grammar, json_rule
from tests.tiny_models import VOCAB_SIZE, build_tokenizer

EOS = 2
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "label": {"enum": ["é", "no"]}},
    "required": ["x", "label"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def compiler(tokenizer: Any) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({EOS}))
    yield compiler
    compiler.close()


def start(schema: dict[str, Any]) -> str:
    return f"start: {json_rule(schema)}\n"


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nope"}, "Invalid type: nope"),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"$ref": "#/$defs/gone"}, "does not exist"),
        ({"$ref": "#"}, "no text can satisfy it"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum (5) is greater than maximum (4)"),
        ({"enum": [f"value {i}" for i in range(100_000)]}, "too big"),
    ],
)
def test_a_grammar_that_no_answer_can_follow_is_refused_with_its_reason(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadGrammar) as caught:
        check_grammar(start(schema))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "%json" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "start: gone\n", "nonsense"])
def test_what_is_no_grammar_is_refused(text: str, compiler: GrammarCompiler) -> None:
    with pytest.raises(BadGrammar):
        check_grammar(text)
    with pytest.raises(BadGrammar):
        compiler.open(text).result(10)


def test_a_good_grammar_passes() -> None:
    check_grammar(start(POINT))


def test_masks_allow_what_follows_and_the_end_where_the_grammar_ends(tokenizer: Any, compiler: GrammarCompiler) -> None:
    matcher = compiler.open(start(POINT)).result(10)
    text = json.dumps({"x": 42, "label": "é"}, ensure_ascii=False)
    for token_id in ids_of(tokenizer, text):
        assert not matcher.is_complete
        assert matcher.mask.shape == (VOCAB_SIZE,)
        assert matcher.mask[token_id]
        assert not matcher.mask[EOS]
        assert not matcher.mask.all()
        matcher.accept(token_id)
    assert matcher.is_complete
    assert matcher.error is None


def test_where_an_answer_may_end_or_go_on_its_end_is_among_the_tokens(
    tokenizer: Any, compiler: GrammarCompiler
) -> None:
    matcher = compiler.open(start({"type": "integer"})).result(10)
    assert not matcher.mask[EOS]
    (four,) = ids_of(tokenizer, "4")
    matcher.accept(four)
    assert matcher.mask[[EOS, four]].all()
    assert not matcher.is_complete
    matcher.accept(EOS)
    assert matcher.is_complete


def test_a_matcher_opened_behind_an_answer_is_where_the_answer_left_off(
    tokenizer: Any, compiler: GrammarCompiler
) -> None:
    answer = ids_of(tokenizer, '{"x": 4')
    walked = compiler.open(start(POINT)).result(10)
    for token_id in answer:
        walked.accept(token_id)
    opened = compiler.open(start(POINT), answer).result(10)
    assert np.array_equal(opened.mask, walked.mask)
    with pytest.raises(BadGrammar, match="does not follow"):
        compiler.open(start(POINT), ids_of(tokenizer, "[1")).result(10)


def test_matchers_of_one_grammar_know_nothing_of_each_other(tokenizer: Any, compiler: GrammarCompiler) -> None:
    one, other = (compiler.open(start(POINT)).result(10) for _ in range(2))
    before = other.mask.copy()
    for token_id in ids_of(tokenizer, '{"x": 4'):
        one.accept(token_id)
    assert np.array_equal(other.mask, before)


def test_the_least_recently_used_grammar_goes_first(tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({EOS}), max_compiled=3)
    grammars = [start({"const": i}) for i in range(4)]
    for text in [*grammars[:3], grammars[0], grammars[3]]:
        compiler.open(text).result(10)
    assert list(compiler._compiled) == [grammars[2], grammars[0], grammars[3]]
    compiler.close()


def test_only_tokens_that_the_model_has_a_logit_for_are_in_a_mask(tokenizer: Any) -> None:
    for size in (VOCAB_SIZE + 37, VOCAB_SIZE - 10):
        compiler = GrammarCompiler(tokenizer, size, frozenset({EOS}))
        assert compiler.open(start(POINT)).result(10).mask.shape == (size,)
        compiler.close()


def test_a_tokenizer_that_cannot_be_read_refuses_grammars_and_nothing_else() -> None:
    compiler = GrammarCompiler(object(), VOCAB_SIZE, frozenset({EOS}))
    with pytest.raises(BadGrammar, match="tokenizer"):
        compiler.open(start(POINT)).result(10)
    compiler.close()


def test_a_token_that_is_not_allowed_is_an_error_for_ever(tokenizer: Any, compiler: GrammarCompiler) -> None:
    matcher = compiler.open(start(POINT)).result(10)
    for token_id in (EOS, *ids_of(tokenizer, "{")):
        matcher.accept(token_id)
        assert matcher.error is not None
        assert not matcher.is_complete


def test_closing_waits_for_the_present_grammar_alone(tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, frozenset({EOS}))
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
    opened = [compiler.open(start({**wide, "title": str(i)})) for i in range(50)]
    compiler.close()
    assert all(one.done() for one in opened)
    assert any(one.cancelled() for one in opened)
