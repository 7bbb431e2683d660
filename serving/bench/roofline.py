"""What this machine can do at most, measured in the same run as what it is held against."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from serving.bench.report import best_seconds
from serving.engine.linear import make_linear
from serving.engine.runner import set_num_threads

_GEMM_SIZE = 1024
_VECTOR_ROWS, _VECTOR_COLUMNS = 16384, 4096
"""A matrix of 256 MB: far more than any cache holds."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Peak of matrix multiplication, and of reading memory once."""

    gemm_flops_per_s: float
    read_bytes_per_s: float

    @classmethod
    def measure(cls, num_threads: int, rounds: int = 5) -> "Roofline":
        """On a thread of its own: OpenMP's threads go with it, and leave the cores to whoever comes next."""
        with ThreadPoolExecutor(1, initializer=set_num_threads, initargs=(num_threads,)) as own:
            return own.submit(cls._measure, rounds).result()

    @classmethod
    def _measure(cls, rounds: int) -> "Roofline":
        a, b = torch.randn(_GEMM_SIZE, _GEMM_SIZE), torch.randn(_GEMM_SIZE, _GEMM_SIZE)
        matrix, vector = torch.randn(_VECTOR_ROWS, _VECTOR_COLUMNS), torch.randn(_VECTOR_COLUMNS)
        # Weights that stay are multiplied faster where they can be packed once: the limit is the best that there is.
        packed = make_linear(b)
        gemm_s = min(best_seconds(multiply, rounds * 4) for multiply in (lambda: a @ b, lambda: packed(a)))
        # torch's matrix-vector product uses one thread, which may not be all that the memory gives; nor need the sum.
        read_s = min(best_seconds(read, rounds) for read in (lambda: matrix @ vector, matrix.sum))
        return cls(2 * _GEMM_SIZE**3 / gemm_s, matrix.nbytes / read_s)


def prefill_flops(config: Any, num_parameters: int, num_tokens: int) -> float:
    """Arithmetic of a causal prefill: 2 x parameters outside the embedding x tokens, plus attention.

    Attention takes 2 x 2 x heads x head_dim per pair of tokens and layer, over half of the square. The output
    head is left out: only the last token passes it.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pairs = num_tokens * (num_tokens + 1) / 2
    attention = 4 * config.num_attention_heads * head_dim * pairs * config.num_hidden_layers
    return float(2 * num_parameters * num_tokens + attention)
