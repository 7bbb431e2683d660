"""Fixtures of the engine's tests."""

from pathlib import Path

import pytest

from tests.oracle import Oracle


@pytest.fixture(scope="session")
def oracle(tiny_model_dir: Path) -> Oracle:
    return Oracle(tiny_model_dir)
