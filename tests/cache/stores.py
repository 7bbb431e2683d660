"""Node stores on real memory and real files, and how tests look at them from outside."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cache.client import WarehouseClient
from cache.node_store import NodeStore, NodeStoreConfig
from cache.tiers.disk import FileTier
from cache.tiers.files import Files
from cache.tiers.memory import MemoryTier
from tests.cache.chains import query, read_and_check, store_config

TOKENS = list(range(100, 130))
"""Seven full blocks and a tail of two tokens."""
OTHER = list(range(500, 512))
"""Three full blocks."""


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class HangingFiles(Files):
    """A disk that stops answering when it is told to make something durable, or fails."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.is_asked = threading.Event()
        self.num_failures = 0

    def hang(self) -> None:
        self.is_asked.clear()
        self.answers.clear()

    def sync(self, path: Path) -> None:
        self.is_asked.set()
        self.answers.wait()
        if self.num_failures:
            self.num_failures -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync(path)


def wait_until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Start a call; its answer comes into the list."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    return thread, answers


def open_store(folder: Path | None, config: NodeStoreConfig | None = None, files: Files | None = None) -> NodeStore:
    disk = FileTier(folder, fsync=files is not None, files=files) if folder is not None else None
    return NodeStore(config or store_config(), MemoryTier(), disk)


def read(store: NodeStore, tokens: list[int]) -> tuple[int, set[str]]:
    """Tokens whose KV was read and found right, and the tiers that they came from."""
    found = read_and_check(WarehouseClient(store), query(tokens))
    return found.tokens, set(found.tiers)


def counter(store: NodeStore, name: str) -> int:
    return store.stats().counters.get(name, 0)


def extent_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("extents/*/*/*.kv"))


def damage(folder: Path, extent_id: str, at: int = -1) -> None:
    """Flip a bit of an extent's file."""
    (path,) = folder.glob(f"extents/*/*/{extent_id}.kv")
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
