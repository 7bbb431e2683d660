import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cache.hashing import TokenIds, as_token_ids
from serving.answer_memory import ENTRY_BYTES, MAX_BRANCHES, AnswerMemory
from serving.chat import ChatMessage, ChatTemplate
from serving.protocol import TokenBatch
from serving.vocabulary import Vocabulary
from tests.tiny_models import VOCAB_SIZE, build_tokenizer

TOKENIZER = build_tokenizer()
TEMPLATE = ChatTemplate(TOKENIZER)
VOCABULARY = TEMPLATE.vocabulary
IM_END = TOKENIZER.eos_token_id
STRIPPING = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}" + (
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTE_OF = {VOCABULARY.piece(i).data: i for i in reversed(range(VOCABULARY.size)) if len(VOCABULARY.piece(i).data) == 1}

HELLO = [ChatMessage("user", "hello then")]
ANSWER = "the hen\n\nand the night"


def in_bytes(text: str) -> list[int]:
    """Ids of `text`, one for each byte: other ids than the tokenizer's own wherever it joins bytes."""
    return [BYTE_OF[bytes([byte])] for byte in text.encode()]


def plain(text: str) -> TokenIds:
    return VOCABULARY.tokenize(text)


def text_of(said: list[int]) -> str:
    """What the client gets to see."""
    return str(TOKENIZER.decode(said, skip_special_tokens=True))


def next_turn(answer: str, *more: ChatMessage, said_before: Sequence[ChatMessage] = HELLO) -> TokenIds:
    """The plain prompt after `answer`."""
    return TEMPLATE.render([*said_before, ChatMessage("assistant", answer), *(more or (ChatMessage("user", "go on"),))])


def memory_of(answer: Sequence[int], prompt: TokenIds | None = None) -> AnswerMemory:
    """One that knows a single answer."""
    memory = AnswerMemory(VOCABULARY)
    memory.remember(TEMPLATE.render(HELLO) if prompt is None else prompt, answer)
    return memory


def starts_with(token_ids: TokenIds, *parts: Sequence[int] | TokenIds) -> bool:
    start = np.concatenate([as_token_ids(part) for part in parts])
    return np.array_equal(token_ids[: len(start)], start)


def test_the_answer_in_question_is_really_cut_otherwise() -> None:
    prompt = TEMPLATE.render(HELLO)
    assert not starts_with(next_turn(ANSWER), prompt, in_bytes(ANSWER))
    assert starts_with(next_turn(ANSWER), prompt, plain(ANSWER))


@pytest.mark.parametrize("answer", [ANSWER, "\n\n" + ANSWER, ANSWER + "\n", " the", "für Öl 😀", "a"])
def test_the_next_turn_begins_with_prompt_and_answer_as_they_were(answer: str) -> None:
    prompt, said = TEMPLATE.render(HELLO), [*in_bytes(answer), IM_END]
    plainly = next_turn(answer)
    recalled = memory_of(said).recall(plainly)
    assert starts_with(recalled, prompt, said)
    assert VOCABULARY.decode(recalled.tolist()) == VOCABULARY.decode(plainly.tolist())
    assert np.array_equal(recalled[len(prompt) + len(said) :], plainly[-(len(recalled) - len(prompt) - len(said)) :])


def test_every_turn_of_a_conversation_continues_the_last_one() -> None:
    memory, messages = AnswerMemory(VOCABULARY), list(HELLO)
    history = as_token_ids([])
    for answer in ("the hen", "\n\nthen\n\n", "the end\n", "that the night"):
        prompt = memory.recall(TEMPLATE.render(messages))
        assert starts_with(prompt, history)
        said = [*in_bytes(answer), IM_END]
        memory.remember(prompt, said)
        history = as_token_ids([*prompt, *said])
        messages += [ChatMessage("assistant", answer), ChatMessage("user", "and\n\nthen the")]
    memory.check_integrity()


@pytest.mark.parametrize("ending", [[], [IM_END], [IM_END, *in_bytes("the"), IM_END]])
def test_what_is_behind_a_special_token_was_not_part_of_the_text(ending: list[int]) -> None:
    said = in_bytes(ANSWER)
    recalled = memory_of([*said, *ending]).recall(next_turn(ANSWER))
    assert starts_with(recalled, TEMPLATE.render(HELLO), said, [IM_END])


@pytest.mark.parametrize(
    ("edited", "kept"), [("The hen", ""), ("the hen\n\nAND", "the hen\n\n"), ("the henthe", "the hen")]
)
def test_an_edited_answer_is_encoded_plainly_from_the_edit_on(edited: str, kept: str) -> None:
    plainly = next_turn(edited)
    recalled = memory_of(in_bytes(ANSWER)).recall(plainly)
    assert VOCABULARY.decode(recalled.tolist()) == VOCABULARY.decode(plainly.tolist())
    prompt = TEMPLATE.render(HELLO)
    assert starts_with(recalled, prompt, in_bytes(kept), plain(edited[len(kept) :]))
    if not kept:
        assert np.array_equal(recalled, plainly)


def test_behind_an_edit_in_the_history_nothing_is_known() -> None:
    memory = memory_of(in_bytes(ANSWER))
    plainly = next_turn(ANSWER, said_before=[ChatMessage("user", "hello, then")])
    assert np.array_equal(memory.recall(plainly), plainly)


def test_a_template_that_strips_answers_loses_only_what_it_stripped() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = STRIPPING
    template = ChatTemplate(tokenizer)
    prompt = template.render(HELLO)
    plainly = template.render([*HELLO, ChatMessage("assistant", "the hen \n"), ChatMessage("user", "go on")])
    recalled = memory_of([*in_bytes("the hen \n"), IM_END], prompt).recall(plainly)
    assert starts_with(recalled, prompt, in_bytes("the hen"), [IM_END])
    assert VOCABULARY.decode(recalled.tolist()) == VOCABULARY.decode(plainly.tolist())


def test_tokens_of_a_stop_string_are_left_out() -> None:
    then = plain("then").tolist()
    assert len(then) < 4
    recalled = memory_of([*in_bytes("the "), *then]).recall(next_turn("the th"))
    assert starts_with(recalled, TEMPLATE.render(HELLO), in_bytes("the "), plain("th"), [IM_END])


def test_bytes_that_are_no_character_come_back_as_they_were() -> None:
    said = [*in_bytes("the "), BYTE_OF[b"\xc3"], BYTE_OF[b"\xff"], *in_bytes(" then"), *in_bytes("é")[:1]]
    text = text_of(said)
    assert "\ufffd" in text
    recalled = memory_of(said).recall(next_turn(text))
    assert starts_with(recalled, TEMPLATE.render(HELLO), said, [IM_END])


def test_branches_of_one_prompt_are_told_apart_by_their_text() -> None:
    prompt, texts = TEMPLATE.render(HELLO), ["the hen", "the hen then", "then", "\n\n"]
    memory = AnswerMemory(VOCABULARY)
    for text in texts:
        memory.remember(prompt, in_bytes(text))
    for text in texts:
        assert starts_with(memory.recall(next_turn(text)), prompt, in_bytes(text), [IM_END])


def test_of_the_same_text_the_latest_tokens_count() -> None:
    prompt, memory = TEMPLATE.render(HELLO), memory_of(in_bytes(ANSWER))
    memory.remember(prompt, plain(ANSWER).tolist())
    assert starts_with(memory.recall(next_turn(ANSWER)), prompt, plain(ANSWER))
    memory.remember(prompt, in_bytes(ANSWER))
    assert starts_with(memory.recall(next_turn(ANSWER)), prompt, in_bytes(ANSWER))
    memory.check_integrity()


def test_tenants_do_not_see_each_others_answers() -> None:
    prompt, memory = TEMPLATE.render(HELLO), AnswerMemory(VOCABULARY)
    memory.remember(prompt, in_bytes(ANSWER), "one")
    plainly = next_turn(ANSWER)
    for tenant in ("two", ""):
        assert np.array_equal(memory.recall(plainly, tenant), plainly)
    assert starts_with(memory.recall(plainly, "one"), prompt, in_bytes(ANSWER))
    memory.remember(prompt, in_bytes(ANSWER), "two")
    assert memory.forget("one") == 1
    assert np.array_equal(memory.recall(plainly, "one"), plainly)
    assert starts_with(memory.recall(plainly, "two"), prompt, in_bytes(ANSWER))
    memory.check_integrity()


def test_the_least_recently_used_is_forgotten_first() -> None:
    prompts = [TEMPLATE.render([ChatMessage("user", f"number {i}")]) for i in range(4)]
    said = in_bytes(ANSWER)
    entry_bytes = 4 * (len(said) + len(plain("assistant\n"))) + ENTRY_BYTES
    memory = AnswerMemory(VOCABULARY, max_bytes=3 * entry_bytes)

    def is_known(i: int) -> bool:
        plainly = next_turn(ANSWER, said_before=[ChatMessage("user", f"number {i}")])
        return starts_with(memory.recall(plainly), prompts[i], said)

    for prompt in prompts[:3]:
        memory.remember(prompt, said)
    assert is_known(0)  # and used with that
    memory.remember(prompts[3], said)
    memory.check_integrity()
    assert [is_known(i) for i in range(4)] == [True, False, True, True]
    memory.remember(prompts[0], in_bytes("the " * 10_000))
    memory.check_integrity()
    assert repr(memory) == f"<AnswerMemory 0 contexts, 0 of {3 * entry_bytes} bytes>"


def test_the_branches_of_one_prompt_are_bounded() -> None:
    prompt, memory = TEMPLATE.render(HELLO), AnswerMemory(VOCABULARY)
    texts = [f"{i} then" for i in range(MAX_BRANCHES + 1)]
    for text in texts:
        memory.remember(prompt, in_bytes(text))
        memory.check_integrity()
    assert np.array_equal(memory.recall(next_turn(texts[0])), next_turn(texts[0]))
    assert starts_with(memory.recall(next_turn(texts[1])), prompt, in_bytes(texts[1]))


@pytest.mark.parametrize("prompt", ["once", "Thought: the\nAction:", "line\n", "<|im_start|>user\nthe<|im_end|>\n"])
@pytest.mark.parametrize("more", ["", "\nObservation: then", "n then\n", "<|im_end|>"])
def test_a_plain_prompt_that_goes_on_behind_its_completion(prompt: str, more: str) -> None:
    said = in_bytes(" then the\n\nhen")
    memory = memory_of(said, plain(prompt))
    plainly = plain(f"{prompt} then the\n\nhen{more}")
    recalled = memory.recall(plainly)
    assert VOCABULARY.decode(recalled.tolist()) == VOCABULARY.decode(plainly.tolist())
    # Text that is joined to the completion's last word is encoded with that word; anything else leaves it whole.
    num_kept = len(said) - (3 if more.startswith("n") else 0)
    assert starts_with(recalled, plain(prompt), said[:num_kept])


def test_completions_in_many_steps_within_one_line() -> None:
    """Where a step begins inside of what the step before has said."""
    memory, text, history = AnswerMemory(VOCABULARY), "first\nthe", as_token_ids([])
    for step in (" hen\nthen the", " night", " then", "\nthe hen"):
        prompt = memory.recall(plain(text))
        assert starts_with(prompt, history)
        memory.remember(prompt, in_bytes(step))
        history = as_token_ids([*prompt, *in_bytes(step)])
        text += step
    assert starts_with(memory.recall(plain(text)), history)


def test_a_sentencepiece_vocabulary() -> None:
    words = ["<unk>", "<s>", "\u2581", "\u2581a", "a", "b", "ab", "\u2581ab", "\n", "\n\n"]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)},
        merges=[("a", "b"), ("\u2581", "a"), ("\u2581", "ab"), ("\n", "\n")],
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")  # type: ignore[no-untyped-call]
    vocabulary = Vocabulary(fast)
    prompt, said = as_token_ids([1, 5]), as_token_ids([3, 5, 8, 8])
    plainly = as_token_ids([1, 5, 7, 9, 4])
    memory = AnswerMemory(vocabulary)
    memory.remember(prompt, said.tolist())
    assert memory.recall(plainly).tolist() == [1, 5, 3, 5, 8, 8, 4]


IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=24)


@settings(max_examples=300)
@given(st.lists(st.tuples(IDS, st.text(alphabet="the \nn\ufffdé", max_size=8), st.booleans()), max_size=5))
def test_no_prompt_ever_changes_its_text(turns: list[tuple[list[int], str, bool]]) -> None:
    """Whatever was said, and whatever the client makes of it."""
    memory, messages = AnswerMemory(VOCABULARY), list(HELLO)
    for said, own_text, is_edited in turns:
        plainly = TEMPLATE.render(messages)
        prompt = memory.recall(plainly)
        assert VOCABULARY.decode(prompt.tolist()) == VOCABULARY.decode(plainly.tolist())
        memory.remember(prompt, said)
        text = text_of(said)
        messages.append(ChatMessage("assistant", text[: len(text) // 2] + own_text if is_edited else text))
        messages.append(ChatMessage("user", own_text))
        following = memory.recall(TEMPLATE.render(messages))
        special = [i for i, token_id in enumerate(said) if token_id in TOKENIZER.all_special_ids]
        if not is_edited and not special:
            assert starts_with(following, prompt, said)
    memory.check_integrity()


@given(IDS, IDS, IDS)
def test_prompts_of_any_ids_keep_their_text(prompt: list[int], said: list[int], more: list[int]) -> None:
    if not prompt:
        return
    memory = memory_of(said, as_token_ids(prompt))
    plainly = as_token_ids([*prompt, *plain(VOCABULARY.decode(said)), *more])
    assert VOCABULARY.decode(memory.recall(plainly).tolist()) == VOCABULARY.decode(plainly.tolist())


async def batches_of(*batches: TokenBatch) -> AsyncGenerator[TokenBatch, None]:
    for batch in batches:
        yield batch


def test_answers_are_heard_as_they_pass() -> None:
    prompt, memory = TEMPLATE.render(HELLO), AnswerMemory(VOCABULARY)
    first, second = in_bytes("the hen"), in_bytes("then\n\n")
    passing = batches_of(
        TokenBatch(tuple(first[:3]), "the"),
        TokenBatch(tuple(second), "then\n\n", choice=1),
        TokenBatch((*first[3:], IM_END), " hen", "stop"),
        TokenBatch((), "", "length", choice=1),
    )

    async def listen() -> None:
        heard = []
        async for batch in memory.hear(passing, prompt):
            heard.append(batch)
            if batch.finish_reason == "stop":  # known before anybody else has the batch
                assert starts_with(memory.recall(next_turn("the hen")), prompt, first)
        assert len(heard) == 4

    asyncio.run(listen())
    assert starts_with(memory.recall(next_turn("then\n\n")), prompt, second)


def test_who_hangs_up_has_the_beginning() -> None:
    prompt, memory = TEMPLATE.render(HELLO), AnswerMemory(VOCABULARY)
    said = in_bytes("the hen then")

    async def hang_up() -> None:
        passing = memory.hear(batches_of(TokenBatch(tuple(said), "the hen then"), TokenBatch((), "more")), prompt)
        await anext(passing)
        await passing.aclose()

    asyncio.run(hang_up())
    assert starts_with(memory.recall(next_turn("the hen then")), prompt, said)


def test_several_threads_at_once() -> None:
    memory = AnswerMemory(VOCABULARY, max_bytes=6000)

    def converse(number: int) -> None:
        messages = [ChatMessage("user", f"number {number}")]
        for turn in range(8):
            plainly = TEMPLATE.render(messages)
            prompt = memory.recall(plainly)
            assert VOCABULARY.decode(prompt.tolist()) == VOCABULARY.decode(plainly.tolist())
            memory.remember(prompt, in_bytes(f"the {turn} then"))
            messages += [ChatMessage("assistant", f"the {turn} then"), ChatMessage("user", "go on")]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(converse, range(12)))
    memory.check_integrity()
