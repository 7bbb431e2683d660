"""Answers prompts of token ids with llama.cpp: `PYTHON llama_peer.py FILE.gguf NUM_THREADS MAX_TOKENS`.

Runs in an environment of its own and imports nothing of this project; `peer.py` says what goes over the pipes. The
weights are unpacked to float32 first, and so is the KV. One sequence at a time, and nothing is reused between prompts.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(gguf: str, num_threads: int, max_tokens: int) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    import llama_cpp  # type: ignore[import-not-found] # of the other environment

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "float32.gguf"
        _unpack(llama_cpp, Path(gguf), model)
        llama = llama_cpp.Llama(
            str(model),
            n_ctx=max_tokens,
            n_threads=num_threads,
            n_threads_batch=num_threads,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
    _say(out, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        (prompt,) = asked["prompts"]
        _say(out, {"times": [_answer(llama, prompt, asked["max_tokens"])]})


def _unpack(llama_cpp: Any, source: Path, target: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise RuntimeError(f"{source} can't be unpacked")


def _answer(llama: Any, prompt: list[int], max_tokens: int) -> list[float]:
    """When the tokens came, in seconds after the start."""
    llama.reset()
    llama._ctx.kv_cache_clear()
    started = time.perf_counter()
    times: list[float] = []
    tokens = prompt
    while len(times) < max_tokens:
        llama.eval(tokens)
        tokens = [llama.sample(temp=0.0)]
        times.append(time.perf_counter() - started)
    return times


def _say(out: Any, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
