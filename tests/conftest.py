"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a tokenizer and a chat template."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny_model") / "llama")
