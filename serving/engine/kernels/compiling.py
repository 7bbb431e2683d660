"""How the loops are compiled, and the threads that they run on.

Compiled code is kept beside these files or in the user's cache folder, so only the first process after an
installation compiles.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import njit

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_settings: Any = numba.config  # its types know no settings

_ALLOWED = {"arcp", "contract", "nnan", "ninf", "nsz"}
"""What LLVM may take for granted or do with floats: all but another order of sums."""

F = TypeVar("F", bound=Callable[..., Any])


@cache
def _digest_of_sources() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.blake2b(b"".join(source.read_bytes() for source in sources), digest_size=16).hexdigest()


def compiled(**options: Any) -> Callable[[F], F]:
    """`njit` as all of the loops have it.

    `reorders=True` lets sums be taken in any order. It holds for what is compiled in the function's place too, and
    would simplify `exp2` into something wrong.
    """
    fastmath = True if options.pop("reorders", False) else _ALLOWED

    def decorate(function: F) -> F:
        dispatcher: Any = njit(fastmath=fastmath, error_model="numpy", nogil=True, **options)(function)
        with suppress(RuntimeError):  # no folder for it that this user may write to: then each process compiles
            dispatcher.enable_caching()
            # numba looks whether a function's own file has changed. What is compiled in its place may be in another.
            dispatcher._cache._cache_file._source_stamp = _digest_of_sources()
        return cast("F", dispatcher)

    return decorate


@cache
def available() -> bool:
    """Whether numba shares OpenMP's threads with torch here, which it does on Linux."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        importlib.import_module("numba.np.ufunc.omppool")  # looks for OpenMP's library, which torch has loaded
    except ImportError:
        return False
    _settings.THREADING_LAYER = "omp"
    num_threads = torch.get_num_threads()
    numba.get_num_threads()  # starts its side of OpenMP, which sets this number for the calling thread
    torch.set_num_threads(num_threads)
    return True


def set_num_threads(num_threads: int) -> None:
    """Threads of the calling thread's loops."""
    if available():
        numba.set_num_threads(min(num_threads, _settings.NUMBA_NUM_THREADS))
