"""The environment that Ray is started in: token authentication on, the user's own settings untouched."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from serving.ray_session import RaySetupError, ensure_token, prepare_environment

NICENESS = "RAY_worker_niceness"
"""In Ray's own spelling."""
SETTINGS = (
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    NICENESS,
    "RAY_USAGE_STATS_ENABLED",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "TOKENIZERS_PARALLELISM",
)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts from an environment without our settings, and leaves none."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)


def test_authentication_is_on_with_a_token_for_the_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "tokenloft"
    prepare_environment(directory)
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert path.parent == directory
    assert path.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert len(path.read_text()) == 64
    assert os.environ[NICENESS] == "0"
    assert [entry.name for entry in directory.iterdir()] == [path.name], "nothing is left beside it"


def test_the_token_stays_the_same(tmp_path: Path) -> None:
    first = ensure_token(tmp_path).read_text()
    assert ensure_token(tmp_path).read_text() == first


def test_two_folders_have_two_tokens(tmp_path: Path) -> None:
    assert ensure_token(tmp_path / "a").read_text() != ensure_token(tmp_path / "b").read_text()


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "s" * 64), ("RAY_AUTH_TOKEN_PATH", "/somewhere/else/token")]
)
def test_a_token_of_the_users_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv(NICENESS, "5")
    prepare_environment(tmp_path)
    assert os.environ[name] == value
    assert os.environ[NICENESS] == "5"
    assert list(tmp_path.iterdir()) == []


def test_starts_at_once_agree_on_one_token(tmp_path: Path) -> None:
    num_starts = 8
    barrier, tokens = threading.Barrier(num_starts), list[str]()

    def start() -> None:
        barrier.wait()
        tokens.append(ensure_token(tmp_path).read_text())

    threads = [threading.Thread(target=start) for _ in range(num_starts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == num_starts
    assert len(set(tokens)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RaySetupError, match=r"file/state.*RAY_AUTH_TOKEN_PATH"):
        ensure_token(tmp_path / "file" / "state")


def test_ray_is_not_imported_before_its_environment_is_set() -> None:
    code = "import sys, serving.cli; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
