"""The oracle of all parity tests: plain transformers `generate`, greedy, float32, one sequence, no cache of ours.

Equality is rule 1 of the design: the same tokens, or a first difference at a near tie, where the oracle's two
best logits are closer than `NEAR_TIE_GAP`. Near ties are counted, never hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

NEAR_TIE_GAP = 1e-3


@dataclass
class Parity:
    """Tally of comparisons."""

    num_turns: int = 0
    num_tokens: int = 0
    near_ties: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.num_turns} turns, {self.num_tokens} tokens, {len(self.near_ties)} near ties"


class Oracle:
    """Greedy answers of a model folder."""

    def __init__(self, model_dir: Path) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        self._model = model.eval()
        self.parity = Parity()
        self._answers: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def generate(self, token_ids: Sequence[int] | np.ndarray[Any, Any], max_tokens: int) -> list[int]:
        """The tokens after `token_ids`, at most `max_tokens`, up to the end-of-sequence token and with it."""
        prompt = torch.tensor(np.asarray(token_ids, dtype=np.int64))[None]
        with torch.inference_mode():
            output = self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        tokens: list[int] = output[0, prompt.shape[1] :].tolist()
        return tokens

    def check(self, token_ids: Sequence[int] | np.ndarray[Any, Any], answer: Sequence[int], max_tokens: int) -> None:
        """Raise AssertionError unless `answer` equals the oracle's as rule 1 defines it."""
        expected = self.remember([int(token_id) for token_id in token_ids], max_tokens)
        self.parity.num_turns += 1
        self.parity.num_tokens += len(expected)
        if list(answer) == expected:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b),
            min(len(answer), len(expected)),
        )
        assert at < min(len(answer), len(expected)), f"answer has {len(answer)} tokens, the oracle's {len(expected)}"
        gap, best = self._top_two([*token_ids, *expected[:at]])
        assert gap < NEAR_TIE_GAP, f"token {at} is {answer[at]}, not {expected[at]}, and no near tie (gap {gap:.4f})"
        assert answer[at] in best, f"token {at} is {answer[at]}, which is none of the two best {best}"
        self.parity.near_ties.append(f"token {at}: gap {gap:.6f}")

    def check_text(
        self,
        tokenizer: Any,
        token_ids: Sequence[int] | np.ndarray[Any, Any],
        text: str,
        num_tokens: int,
        max_tokens: int,
    ) -> list[int]:
        """`check` for an answer of which only the text and the number of tokens are known; returns its tokens.

        After a near tie the oracle is led down the other branch, so the rest of the answer is checked as well.
        Raises AssertionError as `check` does.
        """
        prompt = [int(token_id) for token_id in token_ids]
        expected = self.remember(prompt, max_tokens)
        self.parity.num_turns += 1
        self.parity.num_tokens += len(expected)
        num_forked = 0
        while (_decode(tokenizer, expected), len(expected)) != (text, num_tokens):
            fork = self._fork(tokenizer, prompt, expected, num_forked, text)
            assert fork is not None, (
                f"{text!r} ({num_tokens} tokens) is not {_decode(tokenizer, expected)!r} ({len(expected)} tokens), "
                f"and no near tie after token {num_forked} leads there"
            )
            num_forked = len(fork)
            expected = fork + self.generate(prompt + fork, max_tokens - num_forked)
        return expected

    def remember(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """`generate`, computed once for the same prompt."""
        key = tuple(token_ids), max_tokens
        if key not in self._answers:
            self._answers[key] = self.generate(token_ids, max_tokens)
        return self._answers[key]

    def _fork(
        self, tokenizer: Any, prompt: list[int], expected: list[int], num_forked: int, text: str
    ) -> list[int] | None:
        """The tokens up to a near tie whose other token leads towards `text`, with that token; None without one."""
        at = num_forked
        while at < len(expected) and _leads_to(tokenizer, expected[: at + 1], text):
            at += 1
        for position in range(min(at, len(expected) - 1), num_forked - 1, -1):
            gap, best = self._top_two([*prompt, *expected[:position]])
            fork = [*expected[:position], *(token_id for token_id in best if token_id != expected[position])]
            if gap < NEAR_TIE_GAP and _leads_to(tokenizer, fork, text):
                self.parity.near_ties.append(f"token {position}: gap {gap:.6f}")
                return fork
        return None

    def _top_two(self, token_ids: Sequence[int]) -> tuple[float, list[int]]:
        with torch.inference_mode():
            logits = self._model(torch.tensor([list(map(int, token_ids))])).logits[0, -1]
        top = logits.topk(2)
        return float(top.values[0] - top.values[1]), top.indices.tolist()


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def _leads_to(tokenizer: Any, token_ids: Sequence[int], text: str) -> bool:
    """Whether `text` may begin with these tokens; a character that is not whole yet says nothing."""
    return text.startswith(_decode(tokenizer, token_ids).rstrip("\ufffd"))
