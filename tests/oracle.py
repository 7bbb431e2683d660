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
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).eval()
        self.parity = Parity()

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
        expected = self.generate(token_ids, max_tokens)
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

    def _top_two(self, token_ids: Sequence[int]) -> tuple[float, list[int]]:
        with torch.inference_mode():
            logits = self._model(torch.tensor([list(map(int, token_ids))])).logits[0, -1]
        top = logits.topk(2)
        return float(top.values[0] - top.values[1]), top.indices.tolist()
