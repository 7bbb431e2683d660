"""The warehouse's commands with the key file of the config, and without it."""

import json
from pathlib import Path
from typing import Any

import pytest

from serving.app import Plan, engine_options, node_store_options
from serving.cli import main
from serving.config import load_config
from serving.machine import measure_for
from serving.model_files import ModelFiles
from tests.cache.chains import header_of
from tests.cache.encrypted import KEY, OTHER_KEY, name_of, open_with, read, stored
from tests.cache.stores import OTHER, TOKENS, damage, extent_files


class Command:
    """Runs a command on a folder with eleven encrypted extents."""

    def __init__(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = stored(tmp_path / "w")
        self._capsys = capsys
        self._tmp_path = tmp_path
        self.err = ""

    def __call__(self, *arguments: str, key: bytes | None = KEY, mode: int = 0o600, status: int = 0) -> Any:
        options = ["--warehouse", str(self.folder), "--set", "http.port=1", "--json"]
        if key is not None:
            path = self._tmp_path / "key"
            path.write_text(key.hex())
            path.chmod(mode)
            options += ["--set", f"cache.encryption_key_file={path}"]
        assert main(["warehouse", *arguments, *options]) == status
        out, self.err = self._capsys.readouterr()
        return json.loads(out) if out else None


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


def test_stats_count_what_is_encrypted(run: Command) -> None:
    folder = run("stats", key=None)["folder"]
    assert (folder["num_extents"], folder["num_blocks"], folder["num_tokens"]) == (11, 11, 42)
    assert [each["num_blocks"] for each in folder["fingerprints"]] == [11]


def test_verify_and_rebuild(run: Command) -> None:
    damage(run.folder, name_of(header_of(TOKENS[:4]).extent_id))
    assert run("verify", key=None)["num_unverified"] == 11
    assert run("rebuild", key=None)["num_extents"] == 11
    verified = run("verify", status=1)
    assert (verified["num_bad"], verified["num_unverified"]) == (1, 0)
    assert run("rebuild")["num_extents"] == 10


def test_what_goes_out_comes_back_in(run: Command, tmp_path: Path) -> None:
    archive = str(tmp_path / "a.tar")
    assert run("export", archive)["num_unverified"] == 0
    assert run("purge", "--all", key=None)["num_files"] == 11
    assert run("import", archive, key=None, status=1)["num_locked"] == 11
    assert run("import", archive)["num_extents"] == 11
    assert len(extent_files(run.folder)) == 11
    with open_with(run.folder) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (len(TOKENS), len(OTHER))


def test_a_wrong_key_and_a_wrong_file_are_one_line(run: Command) -> None:
    for command in (("verify",), ("rebuild",), ("purge", "--session", "x"), ("import", __file__)):
        assert run(*command, key=OTHER_KEY, status=1) is None
        assert "is encrypted with another key" in run.err
        assert run(*command, mode=0o640, status=1) is None
        assert "can be used by others (mode 0640): take that away with chmod 600" in run.err
        assert "Traceback" not in run.err
    assert run("verify")["num_extents"] == 11


def test_the_server_passes_the_path_on_and_never_the_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    config = load_config(None, [f"cache.encryption_key_file={tmp_path / 'key'}"])
    budgets = measure_for(config)
    plan = Plan(config, budgets, ModelFiles("m", tmp_path, "digest"), ("node",))
    options = node_store_options(config, budgets), engine_options(plan, "decode"), engine_options(plan, "prefill")
    assert {each.encryption_key_file for each in options} == {tmp_path / "key"}
    assert repr(KEY)[2:-1] not in repr(options) and KEY.hex() not in repr(options)
    assert load_config(None).cache.encryption_key_file is None
