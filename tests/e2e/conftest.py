"""Models for the whole system, and the server's log beside a failure."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.model_store import ALIAS, prepare_model
from serving.terminal import Terminal
from tests.e2e.server import Server
from tests.tiny_models import build_tiny_model


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of the log of every server that a failed test was given."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Server):
                report.sections.append((f"log of {value!r}", value.log_tail()))
    return report


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle shares the cores with a server, where a second spinning thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plain_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model that answers in single ASCII characters and never ends by itself.

    So the text of an answer says exactly which tokens it was, and comes back as the same tokens in the next turn.
    """
    directory = build_tiny_model(tmp_path_factory.mktemp("plain_model") / "tiny-plain", seed=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    plain = _plain_token_ids(tokenizer)
    others = [token_id for token_id in range(len(tokenizer)) if token_id not in plain]
    with torch.no_grad():
        # Logits of exactly zero lose: among so many others some are always above it.
        model.lm_head.weight[others] = 0.0
    model.save_pretrained(directory)
    return directory


def _plain_token_ids(tokenizer: Any) -> set[int]:
    """Tokens of one printable ASCII character that no merge of the tokenizer contains."""
    merged = {character for token in tokenizer.get_vocab() if 1 < len(token) < 10 for character in token}
    plain = [chr(code) for code in range(33, 127) if chr(code) not in merged]
    assert len(plain) > 40, f"the tokenizer merges too much to leave an alphabet: {plain}"
    return {tokenizer.convert_tokens_to_ids(character) for character in plain}


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """Folder of the model that is served by default, fetched if it is not there yet."""
    return prepare_model(ALIAS, Terminal()).directory
