"""What the loops' other tests take for granted: powers of two, and threads. See `test_attention` and `test_fused`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.engine import kernels
from serving.engine.kernels.compiling import compiled
from serving.engine.runner import set_num_threads

pytestmark = pytest.mark.skipif(not kernels.available(), reason="numba shares no threads with torch here")

THREADS = """
import os
import numpy as np
import torch
from serving.engine import kernels
from serving.engine.kernels.compiling import compiled
from serving.engine.runner import set_num_threads

set_num_threads(2)
a = torch.randn(512, 512)
a @ a
before = len(os.listdir("/proc/self/task"))
x = np.ones((64, 512), np.float32)
kernels.norm(x, x[0].copy(), 1e-5, np.empty_like(x))
print(len(os.listdir("/proc/self/task")) - before)
"""


@compiled()
def powers(x: kernels.Floats, out: kernels.Floats) -> None:
    for at in range(len(x)):
        out[at] = kernels.exp2(x[at])


def test_powers_of_two_are_exact_to_two_units_in_the_last_place() -> None:
    x = np.linspace(-125.9, 125.9, 1_000_001).astype(np.float32)
    out = np.empty_like(x)
    powers(x, out)
    assert np.abs(out / np.exp2(x.astype(np.float64)) - 1).max() < 2.5e-7


def test_powers_of_two_stay_within_float32() -> None:
    x = np.array([-1e30, -200, -127, 127, 200, 1e30, 0], np.float32)
    out = np.empty_like(x)
    powers(x, out)
    assert (out[:3] < 1.2e-38).all()
    assert (out[3:6] > 8e37).all()
    assert np.isfinite(out).all()
    assert out[6] == pytest.approx(1, abs=2.5e-7)


def test_gates_of_any_size() -> None:
    gates = np.array([-1e4, -90, -3, 0, 3, 90, 1e4], np.float32)
    out = np.empty((1, 7), np.float32)
    kernels.gate(np.concatenate([gates, np.full(7, 2, np.float32)])[None], out)
    torch.testing.assert_close(torch.from_numpy(out[0]), 2 * torch.nn.functional.silu(torch.from_numpy(gates)))


def test_no_threads_are_made_beside_torchs() -> None:
    """Two pools that wait for work on the same cores would cost more than the loops save."""
    told = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "0"


LAUNCH = """
import torch
from serving.engine import kernels

torch.set_num_threads(1)
print(kernels.available(), torch.get_num_threads())
"""


def test_starting_numbas_threads_leaves_torchs_as_they_are() -> None:
    told = subprocess.run([sys.executable, "-c", LAUNCH], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", "1"]


def test_torch_keeps_the_number_of_threads_that_is_set() -> None:
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 1000):
            set_num_threads(num_threads)
            assert torch.get_num_threads() == num_threads
    finally:
        set_num_threads(before)


UNCACHED = """
import numpy as np
from serving.engine import kernels

x = np.full((1, 8), 3, np.float32)
out = np.empty_like(x)
kernels.norm(x, np.ones(8, np.float32), 0.0, out)
print(out[0, 0], kernels.norm.stats.cache_path)
"""


def test_without_a_folder_to_keep_compiled_code_in_each_process_compiles() -> None:
    nowhere = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}
    told = subprocess.run([sys.executable, "-c", UNCACHED], capture_output=True, text=True, env=nowhere, check=True)
    assert told.stdout.split() == ["1.0", "None"]


STAMP = """
from serving.engine import kernels

print(kernels.norm._cache._cache_file._source_stamp)
"""


def test_compiled_code_is_made_anew_when_any_of_the_files_changes(tmp_path: Path) -> None:
    """numba itself looks at a function's own file alone, and would keep what it took from another."""
    root = Path(__file__).parents[3]
    for package in ("serving", "cache", "router"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def stamp() -> str:
        return subprocess.run(
            [sys.executable, "-c", STAMP], capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout

    before = stamp()
    assert stamp() == before
    with (tmp_path / "serving/engine/kernels/vectors.py").open("a") as vectors:
        vectors.write("# another version\n")
    assert stamp() != before


NARROW = """
import llvmlite.binding as llvm

found = llvm.get_host_cpu_features()
llvm.get_host_cpu_features = lambda: {name: has and "avx512" not in name for name, has in found.items()}

import numpy as np
import torch
from serving.engine import kernels
from serving.engine.kernels import tiles

kernels.available()
generator = np.random.default_rng(0)
panels, x = (generator.normal(size=size).astype(np.float32) for size in ((2, 40, 64), (7, 40)))
out = np.empty((7, 100), np.float32)
kernels.multiply_rows(panels, x, out)
off = abs(out - (x @ panels.transpose(1, 0, 2).reshape(40, 128))[:, :100]).max()

kv = generator.normal(size=(1, 2, 70, 1, 80)).astype(np.float32)
query = generator.normal(size=(70, 7, 80)).astype(np.float32)
chunked, single = np.empty_like(query), np.empty_like(query[-1:])
kernels.attend_chunks(query, np.array([[0, 70, 0, 0, 1]]), np.array([[0, 70]]), kv, 0, 0.1, chunked, 1)
kernels.attend_tokens(query[-1:], np.array([[0, 0, 70]]), kv, 0, 0.1, single)
keys, values = (torch.from_numpy(kv[0, at]).transpose(0, 1).expand(7, -1, -1) for at in (0, 1))
rows = torch.from_numpy(query).transpose(0, 1)
exact = torch.nn.functional.scaled_dot_product_attention(rows, keys, values, is_causal=True, scale=0.1)
exact = exact.transpose(0, 1).numpy()
print(tiles._VECTORS_AT_ONCE, off < 1e-4, abs(chunked - exact).max() < 1e-4, abs(single - exact[-1:]).max() < 1e-4)
"""


@pytest.mark.slow
def test_narrower_registers_give_the_same(tmp_path: Path) -> None:
    """As on a machine without AVX-512: tiles are narrower, and LLVM splits the vectors."""
    narrow = os.environ | {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    told = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True, env=narrow, check=True)
    assert told.stdout.split() == ["1", "True", "True", "True"]
