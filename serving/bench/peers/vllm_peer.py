"""Answers prompts of token ids with vLLM: `PYTHON vllm_peer.py MODEL_DIR NUM_THREADS MAX_TOKENS`.

Runs in an environment of its own and imports nothing of this project; `peer.py` says what goes over the pipes. Nothing
is reused between prompts, weights and KV are float32.
"""

import json
import os
import sys
import time
from typing import Any


def main(model_dir: str, num_threads: int, max_model_len: int) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(num_threads),
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
    )
    import torch
    from vllm import LLM  # type: ignore[import-not-found] # of the other environment

    torch.set_num_threads(num_threads)
    llm = LLM(model_dir, dtype="float32", max_model_len=max_model_len, enable_prefix_caching=False, seed=0)
    torch.set_num_threads(num_threads)
    _say(out, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        _say(out, {"times": _answer(llm.llm_engine, asked["prompts"], asked["max_tokens"])})


def _answer(engine: Any, prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
    """When each prompt's tokens came, in seconds after the start."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    times: dict[str, list[float]] = {str(at): [] for at in range(len(prompts))}
    started = time.perf_counter()
    for at, prompt in enumerate(prompts):
        engine.add_request(str(at), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            come = times[output.request_id.split("-")[0]]
            come += [time.perf_counter() - started] * (len(output.outputs[0].token_ids) - len(come))
    return list(times.values())


def _say(out: Any, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
