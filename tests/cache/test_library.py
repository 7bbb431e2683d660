"""The warehouse from a script: arrays in, the same bits out, whatever made them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cache import Fingerprint, FolderError, FolderInUse, KVShape, Warehouse
from cache.tiers.disk import FileTier

SHAPE = KVShape(num_layers=2, num_kv_heads=3, head_dim=4, dtype="float32")
FINGERPRINT = Fingerprint("weights", "config", "float32", "float32", block_size=8)
TOKENS = list(range(50, 93))
"""Five blocks of eight and a tail of three."""


def kv_of(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 2, num_tokens, 3, 4)).astype(np.float32)


def test_what_was_stored_is_loaded_to_the_bit_also_by_the_next_process(tmp_path: Path) -> None:
    kv = kv_of(len(TOKENS))
    for _ in range(2):
        with Warehouse(FINGERPRINT, SHAPE, directory=tmp_path / "kv") as warehouse:
            assert warehouse.store(TOKENS, kv)
            out = np.zeros_like(kv)
            assert warehouse.load(TOKENS, out) == len(TOKENS)
            assert np.array_equal(out, kv)


def test_a_prompt_that_goes_on_differently_gets_what_it_shares() -> None:
    kv = kv_of(len(TOKENS))
    with Warehouse(FINGERPRINT, SHAPE) as warehouse:
        warehouse.store(TOKENS, kv)
        for shared in (0, 1, 8, 21, 40, 42):
            prompt = [*TOKENS[:shared], 7, 7, 7, 7]
            out = np.zeros((2, 2, len(prompt), 3, 4), np.float32)
            assert warehouse.lookup(prompt) == shared
            assert warehouse.load(prompt, out) == shared
            assert np.array_equal(out[:, :, :shared], kv[:, :, :shared])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_of_any_stored_dtype(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    shape = KVShape(2, 3, 4, name)
    kv = torch.from_numpy(kv_of(20)).to(dtype)
    with Warehouse(Fingerprint("w", "c", name, name, 8), shape) as warehouse:
        assert warehouse.store(range(20), kv)
        pool = torch.zeros(2, 2, 64, 3, 4, dtype=dtype)
        assert warehouse.load(range(20), pool[:, :, 16:36]) == 20, "a part of a larger tensor can be filled in place"
        assert torch.equal(pool[:, :, 16:36], kv)
        assert not pool[:, :, :16].any()
        assert not pool[:, :, 36:].any()


def test_another_fingerprint_is_a_miss(tmp_path: Path) -> None:
    with Warehouse(FINGERPRINT, SHAPE, directory=tmp_path) as warehouse:
        warehouse.store(TOKENS, kv_of(len(TOKENS)))
    other = Fingerprint("other weights", "config", "float32", "float32", block_size=8)
    with Warehouse(other, SHAPE, directory=tmp_path) as warehouse:
        assert warehouse.lookup(TOKENS) == 0
        assert warehouse.stats().num_blocks == 6, "they lie side by side"


def test_what_does_not_fit_is_refused_by_name() -> None:
    with Warehouse(FINGERPRINT, SHAPE, dram_bytes=1) as warehouse:
        assert not warehouse.store(TOKENS, kv_of(len(TOKENS))), "no room is an answer"
        with pytest.raises(ValueError, match=r"expected KV of float32 .* = \(2, 2, 43, 3, 4\), got \(2, 2, 5, 3, 4\)"):
            warehouse.store(TOKENS, kv_of(5))
        with pytest.raises(ValueError, match="of float64"):
            warehouse.load(TOKENS, kv_of(len(TOKENS)).astype(np.float64))
        with pytest.raises(TypeError, match="not list"):
            warehouse.store(TOKENS, [1.0])


def test_a_folder_can_be_encrypted(tmp_path: Path) -> None:
    kv, key_file, folder = kv_of(len(TOKENS)), tmp_path / "key", tmp_path / "kv"
    key_file.write_text("5a" * 32)
    key_file.chmod(0o600)
    for _ in range(2):
        with Warehouse(FINGERPRINT, SHAPE, directory=folder, encryption_key_file=str(key_file)) as warehouse:
            assert warehouse.store(TOKENS, kv)
            out = np.zeros_like(kv)
            assert warehouse.load(TOKENS, out) == len(TOKENS)
            assert np.array_equal(out, kv)
    with Warehouse(FINGERPRINT, SHAPE, directory=folder) as warehouse:
        assert warehouse.lookup(TOKENS) == 0
    key_file.chmod(0o644)
    with pytest.raises(FolderError, match="chmod 600"):
        Warehouse(FINGERPRINT, SHAPE, directory=folder, encryption_key_file=key_file)


def test_a_folder_in_use_is_said(tmp_path: Path) -> None:
    owner = FileTier(tmp_path)
    with pytest.raises(FolderInUse):
        Warehouse(FINGERPRINT, SHAPE, directory=tmp_path, lock_wait_s=0.1)
    owner.close()
