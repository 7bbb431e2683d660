"""Plays conversations against a server: every answer is compared with the oracle's, every reuse with the counters.

    play(server, checker, conversations, order)  ->  one `Turn` per answer

A turn's `reusable_tokens` is what a cache that never forgets could reuse: the longest common prefix of the prompt with
anything whose KV was computed before, at most all but the prompt's last token.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from cache.hashing import TokenIds
from serving.answer_memory import AnswerMemory
from serving.chat import ChatMessage, ChatTemplate
from tests.conversations import Conversation
from tests.e2e.server import ChatAnswer, Server
from tests.oracle import Oracle

TIERS = ("device", "dram", "disk", "remote")


class Memory:
    """Token sequences whose KV has been computed."""

    def __init__(self) -> None:
        self._sequences: list[TokenIds] = []

    def add(self, token_ids: TokenIds) -> None:
        self._sequences.append(token_ids)

    def reusable_tokens(self, prompt: TokenIds) -> int:
        """Length of the longest prefix of `prompt` that is known, without the last token."""
        return max((_common_prefix(prompt[:-1], known) for known in self._sequences), default=0)


def _common_prefix(left: TokenIds, right: TokenIds) -> int:
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length


@dataclass
class Dialogue:
    """One conversation under way."""

    conversation: Conversation
    messages: list[dict[str, str]] = field(default_factory=list)
    num_asked: int = 0
    history_tokens: int = 0
    """Prompt and answer of the last turn together."""

    def __post_init__(self) -> None:
        if self.conversation.system is not None:
            self.messages.append({"role": "system", "content": self.conversation.system})

    def ask(self) -> None:
        """The user speaks."""
        self.say(self.conversation.turns[self.num_asked])
        self.num_asked += 1

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def hear(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer and what it cost by the engines' own counters."""

    dialogue: Dialogue
    number: int
    """From 1."""
    answer: ChatAnswer
    num_prompt_tokens: int
    history_tokens: int
    """Prompt and answer of the dialogue's turn before."""
    reusable_tokens: int
    decode: Counter[str]
    """What the counters of all decode engines have grown by."""
    prefill: Counter[str]

    def __str__(self) -> str:
        return (
            f"{self.dialogue.conversation.name} turn {self.number}: {self.num_prompt_tokens} tokens, "
            f"{self.reusable_tokens} reusable, usage {self.answer.usage['tokenloft']}, "
            f"decode {dict(self.decode)}, prefill {dict(self.prefill)}"
        )

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens that decode took from any tier, by its counters."""
        return sum(self.decode[f"{tier}_tokens"] for tier in TIERS)

    def check_usage(self) -> None:
        """The answer reports what the counters say. Raises AssertionError."""
        by_tier = {tier: self.decode[f"{tier}_tokens"] for tier in TIERS}
        assert dict(self.answer.by_tier) == by_tier, self
        assert self.answer.cached_tokens == self.reused_tokens, self
        computed = self.answer.usage["tokenloft"]["computed"]
        assert computed["decode"] == self.decode["computed_prompt_tokens"], self
        assert self.reused_tokens + computed["prefill"] + computed["decode"] == self.num_prompt_tokens, self


class Checker:
    """Compares answers of one model with the oracle's. Asks the oracle once for each prompt."""

    def __init__(self, model_dir: Path, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.oracle = Oracle(model_dir)
        self._template = ChatTemplate.load(model_dir)
        self._answers = AnswerMemory(self._template.vocabulary)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)

    def render(self, messages: Sequence[dict[str, str]]) -> TokenIds:
        """The prompt's tokens, as the server should see them."""
        plainly = self._template.render([ChatMessage(each["role"], each["content"]) for each in messages])
        return self._answers.recall(plainly)

    def check(self, prompt: TokenIds, answer: ChatAnswer) -> TokenIds:
        """Raise AssertionError unless the answer is the oracle's; returns prompt and answer without the last token."""
        assert answer.num_prompt_tokens == len(prompt)
        answered = self.oracle.check_text(self._tokenizer, prompt, answer.text, answer.num_tokens, self.max_tokens)
        self._answers.remember(prompt, answered)
        return np.concatenate([prompt, np.asarray(answered[:-1], np.int32)])


def one_by_one(dialogues: Iterable[Dialogue]) -> Iterator[Dialogue]:
    """Whose turn it is, if each conversation ends before the next begins."""
    for dialogue in dialogues:
        yield from (dialogue for _ in dialogue.conversation.turns)


def in_rounds(dialogues: Iterable[Dialogue]) -> Iterator[Dialogue]:
    """Whose turn it is, if all say their first turn, then all their second, and so on."""
    for turn in zip_longest(*([dialogue for _ in dialogue.conversation.turns] for dialogue in dialogues)):
        yield from (dialogue for dialogue in turn if dialogue is not None)


def play(
    server: Server,
    checker: Checker,
    order: Iterable[Dialogue],
    memory: Memory,
    *,
    use_cache: bool = True,
    settle: bool = False,
    stream: bool | None = None,
    verify: bool = True,
) -> list[Turn]:
    """Let every dialogue of `order` say its next turn. With `settle` each waits until the last is on disk.

    `stream` None: every second answer is streamed. Without `verify` the oracle, which is slow on long prompts, is
    spared.
    """
    turns: list[Turn] = []
    counters = server.counters()
    for dialogue in order:
        dialogue.ask()
        prompt = checker.render(dialogue.messages)
        reusable = memory.reusable_tokens(prompt) if use_cache else 0
        is_streamed = dialogue.num_asked % 2 == 1 if stream is None else stream
        answer = server.chat(dialogue.messages, checker.max_tokens, use_cache=use_cache, stream=is_streamed)
        before, counters = counters, server.counters()
        # `Counter - Counter` keeps only what has grown.
        decode, prefill = (counters[role] - before[role] for role in ("decode", "prefill"))
        turn = Turn(
            dialogue, dialogue.num_asked, answer, len(prompt), dialogue.history_tokens, reusable, decode, prefill
        )
        turn.check_usage()
        turns.append(turn)
        computed = checker.check(prompt, answer) if verify else prompt
        if use_cache:
            memory.add(computed)
        dialogue.hear(answer.text)
        dialogue.history_tokens = len(prompt) + answer.num_tokens
        if settle:
            server.settle()
    return turns


def total(turns: Iterable[Turn], counter: str) -> int:
    """What the turns add to a counter of decode."""
    return sum(turn.decode[counter] for turn in turns)
