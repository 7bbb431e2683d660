"""A real server with a key file: turns after a restart reuse what is encrypted, and no file tells anything private."""

from pathlib import Path

import pytest

from cache.extent import LOCKED_MAGIC
from tests.e2e.server import Server, ServerHome

pytestmark = pytest.mark.slow

SECRET = bytes(range(7, 39))
SESSION = "a-session-nobody-may-read"
MESSAGES = [{"role": "user", "content": "words that are private " * 40}]


def test_turns_after_a_restart_reuse_what_is_encrypted(plain_model_dir: Path) -> None:
    with ServerHome() as home:
        key_file = home.path / "key"
        key_file.write_text(SECRET.hex())
        key_file.chmod(0o600)
        settings = {"cache.encryption_key_file": key_file, "cache.dram_bytes": "32MB"}
        with Server(home, str(plain_model_dir), settings) as server:
            first = server.chat(MESSAGES, 8, session_id=SESSION)
            assert first.cached_tokens == 0
            server.settle()
            server.stop()
        files = home.extent_files()
        assert files, "the turn is on disk"
        assert all(path.read_bytes().startswith(LOCKED_MAGIC) for path in files)
        with Server(home, str(plain_model_dir), settings) as server:
            again = server.chat(MESSAGES, 8, session_id=SESSION)
            assert again.text == first.text
            assert again.by_tier["disk"] > first.num_prompt_tokens // 2
            server.stop()
        assert SESSION.encode() not in b"".join(path.read_bytes() for path in files_in(home.warehouse))
        for path in (*files_in(home.ray_directory), home.log_path):
            text = path.read_bytes()
            assert SECRET not in text and SECRET.hex().encode() not in text, path


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
