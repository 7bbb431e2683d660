"""The command line: what it understands, what it refuses and how."""

import socket
from pathlib import Path

import pytest

from serving.cli import build_parser, main
from serving.cli_options import config_of
from serving.config import Config


def parse(*arguments: str) -> Config:
    return config_of(build_parser().parse_args(arguments))


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def test_options_win_over_set_and_set_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("http: {port: 1001, host: 127.0.0.2}\ndecode: {replicas: 2}\nmodel: {name: from-file}\n")
    config = parse(
        "serve", "--config", str(path), "--model", "from-option", "--set", "model.name=from-set",
        "--set", "http.port=1002", "--set", "decode.replicas=3", "--set", "decode.replicas=4",
    )  # fmt: skip
    assert config.model.name == "from-option"
    assert config.http.port == 1002
    assert config.http.host == "127.0.0.2"
    assert config.decode.replicas == 4, "the last one counts"


def test_named_options_become_keys(tmp_path: Path) -> None:
    config = parse("serve", "--host", "localhost", "--port", "0", "--warehouse", str(tmp_path))
    assert (config.http.host, config.http.port, config.cache.directory) == ("localhost", 0, tmp_path)


@pytest.mark.parametrize("name", ["~", "1.5", "yes", "a: b", '"quoted"', "{x}"])
def test_a_name_is_taken_as_it_is_written(name: str) -> None:
    assert parse("serve", "--model", name).model.name == name


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("warehouse", "stats", "--warehouse", "~/kv").cache.directory == tmp_path / "kv"


@pytest.mark.parametrize(
    "arguments",
    [[], ["unknown"], ["serve", "--unknown"], ["warehouse"], ["warehouse", "stats", "--port", "1"], ["serve", "--set"]],
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: tokenloft" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    examples = [line.split()[1:] for line in shown.splitlines() if line.startswith("  tokenloft ")]
    assert len(examples) >= 3
    for example in examples:
        build_parser().parse_args(example)


def test_an_unknown_key_gets_a_suggestion(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "did you mean decode.replicas?" in error_line(capsys, "serve", "--set", "decode.replica=2")
    path = tmp_path / "config.yaml"
    path.write_text("htp: {}\n")
    assert f"{path}: htp: unknown key; did you mean http?" in error_line(capsys, "serve", "--config", str(path))


def test_wrong_values_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "http.port" in error_line(capsys, "serve", "--port", "many")
    assert "http.port" in error_line(capsys, "serve", "--port", "70000")
    assert "api_keys" in error_line(capsys, "serve", "--host", "0.0.0.0")
    assert "no such config file" in error_line(capsys, "serve", "--config", str(tmp_path / "missing.yaml"))


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert f"port {port}" in error_line(capsys, "serve", "--port", str(port))


def test_a_warehouse_that_is_a_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("no folder")
    arguments = ("warehouse", "stats", "--warehouse", str(path), "--set", "http.port=1")
    assert f"no warehouse in {path}" in error_line(capsys, *arguments)


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--port", "0", "--model", str(tmp_path / "missing")]) == 1
    step, line = capsys.readouterr().err.splitlines()
    assert "preparing the model" in step
    assert line.startswith(f"error: {tmp_path / 'missing'} is no folder")
