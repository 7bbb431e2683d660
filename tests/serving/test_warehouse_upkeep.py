"""The warehouse's commands as a person runs them: their results, their exit statuses, and what they say."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cache.client import WarehouseClient
from cache.extent import Origin
from serving.cli import build_parser, main
from serving.http_settings import hash_api_key
from serving.tenants import label_of
from tests.cache.chains import ROOT, fill, header_of, offer
from tests.cache.stores import OTHER, TOKENS, damage, extent_files, open_store, read

NOBODY = 1
KEY = "clé"
LABEL = label_of(hash_api_key(KEY).hex())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One session of a server without keys, and one of a key."""
    with open_store(tmp_path / "w") as store:
        assert WarehouseClient(store).store(offer(TOKENS, origin=Origin("", "anna")), fill)
        assert WarehouseClient(store).store(offer(OTHER, origin=Origin(LABEL, "anna")), fill)
    return tmp_path / "w"


class Command:
    """Runs the command, and holds what came of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder = folder
        self._capsys = capsys
        self.err = ""

    def __call__(self, *arguments: str, status: int = 0, port: int = NOBODY, folder: Path | None = None) -> Any:
        where = ["--warehouse", str(folder or self._folder), "--set", f"http.port={port}"]
        assert main(["warehouse", *arguments, *where, "--json"]) == status
        out, self.err = self._capsys.readouterr()
        return json.loads(out) if out else None


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(folder, capsys)


@contextmanager
def server(directory: str | None, status: int = 200) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A server that says it owns `directory`; yields its port and the purges that it is asked for."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"stores": [{"directory": directory}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append({"path": self.path, "key": self.headers["authorization"], **body})
            self._answer(status, {"num_blocks": 5, "num_left": 0, "error": {"message": "not now"}})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the overridden one's name
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as answering:
        thread = threading.Thread(target=answering.serve_forever)
        thread.start()
        try:
            yield answering.server_port, asked
        finally:
            answering.shutdown()
            thread.join()


# -- verify, rebuild --------------------------------------------------------------------------------


def test_verify_says_what_is_bad_and_ends_with_1(folder: Path, run: Command) -> None:
    assert run("verify")["num_bad"] == 0
    bad = header_of(TOKENS[:4]).extent_id
    damage(folder, bad)
    found = run("verify", "--rate", "1GB", status=1)
    assert (found["num_extents"], found["num_bad"], found["is_quarantined"]) == (11, 1, True)
    assert found["bad"] == [{"extent_id": bad, "reason": f"extent {bad}: checksum of block 0 does not match"}]
    assert run("verify")["num_extents"] == 10


def test_tables_are_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder, header_of(TOKENS[:4]).extent_id)
    assert main(["warehouse", "verify", "--warehouse", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "num extents" in out
    assert "error: extent" in err
    assert "[" not in out


def test_rebuild(folder: Path, run: Command) -> None:
    (folder / "index.sqlite").write_bytes(b"?")
    assert run("rebuild") == {"num_extents": 11, "num_blocks": 11, "num_bad": 0}
    assert run("stats")["folder"]["num_blocks"] == 11


def test_a_folder_in_use_must_be_given_up_first(folder: Path, run: Command) -> None:
    with open_store(folder):
        for arguments in (("rebuild",), ("import", __file__), ("purge", "--all"), ("purge", "--tenant")):
            assert run(*arguments, status=1) is None
            assert "is in use by process" in run.err
        assert run("verify")["num_bad"] == 0


# -- purge ------------------------------------------------------------------------------------------


def test_a_session_is_that_of_a_key(folder: Path, run: Command) -> None:
    assert run("purge", "--session", "nobody")["num_extents"] == 0
    receipt = run("purge", "--session", "anna", "--api-key", KEY)
    assert (receipt["num_tokens"], receipt["num_files"], receipt["num_left"]) == (12, 3, 0)
    assert run("purge", "--session", "anna")["num_tokens"] == 30
    assert extent_files(folder) == []


def test_a_tenant_a_fingerprint_and_everything(folder: Path, run: Command) -> None:
    assert run("purge", "--tenant", "--set", f"http.api_keys=[{KEY}]")["num_tokens"] == 12
    assert run("purge", "--fingerprint", "00" * 16)["num_tokens"] == 0
    assert run("purge", "--fingerprint", ROOT.hex())["num_tokens"] == 30
    with open_store(folder) as store:
        assert WarehouseClient(store).store(offer(OTHER), fill)
    assert run("purge", "--all")["num_tokens"] == 12


def test_a_running_server_purges_its_folder_itself(folder: Path, run: Command) -> None:
    with open_store(folder) as store, server(str(folder)) as (port, asked):
        assert run("purge", "--session", "anna", "--api-key", KEY, port=port) == {
            "num_blocks": 5,
            "num_left": 0,
            "error": {"message": "not now"},
        }
        run("purge", "--tenant", port=port)
        run("purge", "--fingerprint", ROOT.hex(), port=port)
        assert run("purge", "--all", status=1, port=port) is None
        assert "stop it first" in run.err
        assert read(store, TOKENS)[0] == 30
    path, header = "/warehouse/purge", f"Bearer {KEY}".encode().decode("latin-1")
    assert asked == [
        {"path": path, "key": header, "session": "anna"},
        {"path": path, "key": None, "tenant": True},
        {"path": path, "key": None, "fingerprint": ROOT.hex()},
    ]


def test_no_other_server_is_asked_to_purge(folder: Path, run: Command, tmp_path: Path) -> None:
    with server("/somewhere/else") as (port, asked), open_store(folder):
        assert run("purge", "--tenant", status=1, port=port) is None
        assert "is in use by process" in run.err
        assert run("purge", "--tenant", status=1, port=port, folder=tmp_path / "missing") is None
        assert "there is no warehouse in" in run.err
    assert asked == []
    with server(None) as (port, asked):
        assert run("purge", "--tenant", port=port, folder=tmp_path / "missing")["num_blocks"] == 5


def test_a_refusal_is_one_line(folder: Path, run: Command) -> None:
    with open_store(folder), server(str(folder), status=401) as (port, _):
        assert run("purge", "--tenant", status=1, port=port) is None
    assert run.err == f"error: the server at http://127.0.0.1:{port} refuses: not now\n"


# -- export, import ---------------------------------------------------------------------------------


def test_what_is_exported_can_be_imported(folder: Path, run: Command, tmp_path: Path) -> None:
    archive, to = str(tmp_path / "a.tar"), tmp_path / "to"
    assert run("export", archive, "--session", "anna")["num_tokens"] == 30
    assert run("import", archive, folder=to)["num_tokens"] == 30
    assert run("import", archive, folder=to)["num_present"] == 8
    with open_store(to) as store:
        assert (read(store, TOKENS)[0], read(store, OTHER)[0]) == (30, 0)
    assert run("export", archive, status=1) is None
    assert "exists already" in run.err
    assert run("export", str(tmp_path / "b.tar"))["num_tokens"] == 42


def test_what_stays_out_is_told_by_the_status(folder: Path, run: Command, tmp_path: Path) -> None:
    damage(folder, header_of(TOKENS[:4]).extent_id)
    archive = str(tmp_path / "a.tar")
    assert run("export", archive, status=1)["num_bad"] == 1
    budget = ("--set", "cache.disk_bytes=10KB")
    assert run("import", archive, *budget, status=1, folder=tmp_path / "to")["num_without_room"] == 8
    assert run("import", str(tmp_path / "missing.tar"), status=1) is None
    assert "is no file" in run.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["purge"],
        ["purge", "--session", "a", "--all"],
        ["purge", "--fingerprint", "abc"],
        ["verify", "--rate", "0"],
        ["verify", "--rate", "fast"],
        ["export"],
        ["import"],
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["warehouse", *arguments])
    assert ended.value.code == 2
    assert "usage: tokenloft warehouse" in capsys.readouterr().err


def test_help_shows_examples_that_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["warehouse", "--help"])
    shown = capsys.readouterr().out
    examples = [line.split()[1:] for line in shown.splitlines() if line.startswith("  tokenloft ")]
    assert len(examples) >= 5
    for example in examples:
        build_parser().parse_args(example)
