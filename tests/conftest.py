"""Fixtures shared by all tests, the `--tau-bench` option, and figures that the summary shows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ray_session import private_ray
from tests.tiny_models import build_tiny_model

TAU_BENCH_TEST = "test_tau_bench.py"
_FIGURES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--tau-bench FILE`: also play the conversations of that file, which takes long."""
    parser.addoption(
        "--tau-bench", metavar="FILE", type=Path, help="JSON of conversations (tau-bench) to play on the default model"
    )
    parser.addoption("--soak-minutes", metavar="N", type=float, default=5.0, help="length of the soak (default 5)")
    parser.addoption(
        "--proofs",
        metavar="N",
        type=int,
        default=1,
        help="N times as many kills and damages to the warehouse (default 1)",
    )
    parser.addoption("--tau-bench-count", metavar="N", type=int, default=5, help="how many of them (default 5)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The long run is no test that gets skipped: without its file it is not there."""
    if collection_path.name == TAU_BENCH_TEST and config.getoption("--tau-bench") is None:
        return True
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show what tests have measured, whether they passed or not."""
    if figures := config.stash.get(_FIGURES, []):
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def report_figure(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Call it with a line for the summary at the end of the run."""
    return pytestconfig.stash.setdefault(_FIGURES, []).append


@pytest.fixture(scope="session")
def proof_scale(pytestconfig: pytest.Config) -> int:
    """How many times as long the proofs of the warehouse run."""
    return int(pytestconfig.getoption("--proofs"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama with a tokenizer and a chat template."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny_model") / "llama")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[str]:
    """One private Ray for all tests that run in this process; gives the id of its node."""
    with private_ray() as node_id:
        yield node_id
