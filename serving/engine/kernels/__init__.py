"""Loops of a step on a CPU, compiled by numba, where torch's operations are far from what the machine gives.

    llvm_builder      instructions, for what is written in LLVM's terms:
    tiles             products whose results stay in registers
    vectors           powers of two, dot products, what brings memory nearer
    rows              norms, gates, rotary positions and the new rows' way into the pool
    products          some rows times packed weights
    token_attention   single tokens over the paged pool
    chunk_attention   chunks of prompts over the paged pool
    layer             a whole layer for single tokens
    compiling         how all of it is compiled, and its threads

All arrays are C-contiguous float32 unless said otherwise, but that queries of chunks and of a layer may be a slice of
their heads. Nothing is checked: callers know the shapes. The loops
run on the threads that torch's own operations use, as both are OpenMP's of one library; where numba has none of
these (see `available`), callers take torch's operations.
"""

import torch

from serving.engine.kernels.chunk_attention import QUERIES, attend_chunks
from serving.engine.kernels.compiling import Floats, Ints, available, set_num_threads
from serving.engine.kernels.layer import decode_layer
from serving.engine.kernels.llvm_builder import WIDTH
from serving.engine.kernels.products import LANES, Panels, multiply_rows, take_rows
from serving.engine.kernels.rows import gate, norm, store_rotated
from serving.engine.kernels.token_attention import attend_tokens
from serving.engine.kernels.vectors import exp2

__all__ = [
    "LANES",
    "QUERIES",
    "Floats",
    "Ints",
    "Panels",
    "attend_chunks",
    "attend_tokens",
    "available",
    "can_attend",
    "decode_layer",
    "exp2",
    "gate",
    "multiply_rows",
    "norm",
    "set_num_threads",
    "store_rotated",
    "take_rows",
]


def can_attend(kv: torch.Tensor) -> bool:
    """Whether attention over a pool like this, `(..., D)`, is computed here."""
    is_known = kv.device.type == "cpu" and kv.dtype == torch.float32 and kv.shape[-1] % WIDTH == 0
    return is_known and available()
