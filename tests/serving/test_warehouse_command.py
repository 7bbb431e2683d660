"""`tokenloft warehouse stats` over a real folder and a real HTTP server."""

import http.server
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cache.errors import FolderError
from cache.node_store import NodeStore
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from serving.config import Config, load_config
from serving.warehouse_command import ask_server, read_folder, show_stats
from tests.cache.chains import ROOT, budgets, store_chain, store_config

NOBODY = 1
"""A port where no server answers."""


def config_of(directory: Path, port: int = NOBODY, *overrides: str) -> Config:
    return load_config(None, [f"cache.directory={json.dumps(str(directory))}", f"http.port={port}", *overrides])


@contextmanager
def warehouse(directory: Path) -> Iterator[NodeStore]:
    """A node store that holds a chain of two blocks and a tail, and one block."""
    with NodeStore(store_config(budgets(blocks=2)), MemoryTier(), FileTier(directory)) as store:
        store_chain(store, list(range(10)))
        store_chain(store, [7, 7, 7, 7])
        assert store.flush()
        yield store


@contextmanager
def server(body: bytes, keys: list[str | None] | None = None) -> Iterator[int]:
    """An HTTP server that gives one answer to everything; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if keys is not None:
                keys.append(self.headers.get("Authorization"))
            self.send_response(200 if self.path == "/warehouse/stats" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the overridden one's name
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as answering:
        thread = threading.Thread(target=answering.serve_forever)
        thread.start()
        try:
            yield answering.server_port
        finally:
            answering.shutdown()
            thread.join()


def shown(config: Config, *, as_json: bool = False) -> str:
    out = io.StringIO()
    show_stats(config, as_json=as_json, out=out)
    return out.getvalue()


@pytest.mark.parametrize("is_running", [False, True])
def test_the_folder_is_read_beside_its_owner_and_without_one(tmp_path: Path, is_running: bool) -> None:
    directory = tmp_path / "a folder? 100%#1"
    with warehouse(directory):
        if is_running:
            folder = read_folder(directory)
    if not is_running:
        folder = read_folder(directory)
    assert folder is not None
    image_bytes = sum(path.stat().st_size for path in directory.glob("extents/*/*/*.kv"))
    assert folder == {
        "directory": str(directory),
        "num_extents": 3,
        "num_blocks": 4,
        "num_tokens": 14,
        "num_fingerprints": 1,
        "disk_bytes": image_bytes,
        "fingerprints": [
            {"fingerprint": ROOT.hex(), "num_extents": 3, "num_blocks": 4, "disk_bytes": image_bytes},
        ],
    }
    assert not list(tmp_path.glob("*-wal")), "reading leaves nothing behind"


def test_json_is_one_object(tmp_path: Path) -> None:
    with warehouse(tmp_path):
        pass
    stats = json.loads(shown(config_of(tmp_path), as_json=True))
    assert stats["folder"]["num_blocks"] == 4
    assert stats["server"] is None


def test_the_table_says_that_no_server_answers(tmp_path: Path) -> None:
    with warehouse(tmp_path):
        pass
    text = shown(config_of(tmp_path))
    assert "num tokens" in text
    assert ROOT.hex() in text
    assert "MiB" in text
    assert "no server answers at http://127.0.0.1:1" in text


def test_a_server_alone_is_enough_and_gets_the_key(tmp_path: Path) -> None:
    body = {"stores": [{"node_id": "n1", "dram_bytes": 3 << 20, "counters": {"load_hits": 12345}}], "engines": {}}
    keys: list[str | None] = []
    with server(json.dumps(body).encode(), keys) as port:
        config = config_of(tmp_path, port, "http.api_keys=[secret]")
        text = shown(config)
        assert json.loads(shown(config, as_json=True)) == {"folder": None, "server": body}
    assert "3.0 MiB" in text
    assert "12,345" in text
    assert "no server" not in text
    assert keys == ["Bearer secret"] * 2


def test_a_proxy_of_the_environment_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with server(b'{"stores": []}') as port:
        assert ask_server(config_of(tmp_path, port)) == {"stores": []}


def test_something_else_on_the_port_is_no_server(tmp_path: Path) -> None:
    for body in (b"<html>", b"[1, 2]"):
        with server(body) as port:
            assert ask_server(config_of(tmp_path, port)) is None
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(b"SSH-2.0-nothing of yours\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert ask_server(config_of(tmp_path, listener.getsockname()[1])) is None
        thread.join()


def test_an_address_of_version_6_is_asked(tmp_path: Path) -> None:
    assert ask_server(config_of(tmp_path, NOBODY, 'http.host="::1"')) is None


def test_neither_folder_nor_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=f"no warehouse in {tmp_path}, and no server answers at http://127"):
        shown(config_of(tmp_path))


def test_an_index_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_text("this is no database")
    with pytest.raises(FolderError, match="can't be read"):
        read_folder(tmp_path)
