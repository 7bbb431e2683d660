"""Answers prompts of token ids with transformers' `generate`: `PYTHON transformers_peer.py MODEL_DIR NUM_THREADS`.

Imports nothing of this project; `peer.py` says what goes over the pipes. Weights and KV are float32. Prompts that are
sent together are one batch, so they must be of one length.
"""

import json
import os
import sys
import time
from typing import Any


def main(model_dir: str, num_threads: int) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    model.eval()
    _say(out, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        times = _answer(model, torch.tensor(asked["prompts"]), asked["max_tokens"])
        _say(out, {"times": [times] * len(asked["prompts"])})


def _answer(model: Any, prompts: Any, max_tokens: int) -> list[float]:
    """When the tokens of each step came, in seconds after the start."""
    import torch

    times: list[float] = []
    started = time.perf_counter()

    def note(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion that never stops: `generate` calls it after each step."""
        times.append(time.perf_counter() - started)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    with torch.inference_mode():
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            stopping_criteria=[note],
        )
    return times


def _say(out: Any, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
