"""Eight clients for minutes, both tiers full and evicting: nothing fails, nothing grows, nothing is left behind.

Five minutes, or `--soak-minutes N`. The slopes of each process's private memory go to the summary.
"""

import itertools
import random
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conversations import log_lines
from tests.e2e.server import Server, ServerHome, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

NUM_CLIENTS = 8
TURNS = 3
SAMPLE_S = 5.0
WARM_SHARE = 0.4
"""Of the run, at its beginning, that slopes leave out: pools, buffers and tables fill up first."""
MAX_GROWTH_MIB = 40
"""Of one process, from the end of the warm share to the end of the run, by the fitted line."""

SETTINGS = {
    "decode.pool_bytes": "3MB",
    "prefill.pool_bytes": "3MB",
    "prefill.remote_threshold_tokens": 256,
    "cache.dram_bytes": "12MB",
    "cache.handoff_bytes": "8MB",
    "cache.disk_bytes": "30MB",
    "cache.extent_max_bytes": "200KB",
}


class Clients:
    """Threads that talk until told to stop. Every fault is kept."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self.num_turns = 0
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        for count in itertools.count():
            if self._is_over.is_set():
                return
            try:
                self._converse(f"{number}-{count}", rng)
            except (AssertionError, OSError, ValueError) as error:
                with self._lock:
                    self.faults.append(f"client {number}, conversation {count}: {error!r}")

    def _converse(self, name: str, rng: random.Random) -> None:
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            text = (
                log_lines(rng.randrange(2, 12), f"{name}-{turn}") if turn == 0 else f"And what of {name}, part {turn}?"
            )
            messages.append({"role": "user", "content": text})
            num_tokens = rng.randrange(8, 40)
            answer = self._server.chat(messages, num_tokens, stream=rng.random() < 0.7)
            assert answer.num_tokens == num_tokens, f"{answer.num_tokens} tokens, not {num_tokens}"
            messages.append({"role": "assistant", "content": answer.text})
            with self._lock:
                self.num_turns += 1


class MemoryWatch:
    """Private memory of each process of the server over time, in MiB."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._samples: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self._names: dict[int, str] = {}

    def sample(self, at_s: float) -> None:
        for pid, title in self._server.processes().items():
            try:
                private = psutil.Process(pid).memory_full_info().uss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            # Ray appends to an actor's title what it is doing at the moment.
            self._names[pid] = title.split()[0].rpartition("/")[2].partition(".")[0]
            self._samples[pid].append((at_s, private / 2**20))

    def slopes(self, from_s: float) -> dict[str, tuple[float, float]]:
        """MiB per minute, and MiB at the end, of each process that lived through the time from `from_s` on."""
        found: dict[str, tuple[float, float]] = {}
        for pid, samples in self._samples.items():
            late = np.array([sample for sample in samples if sample[0] >= from_s])
            if len(late) >= 5 and samples[-1][0] >= from_s:
                slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
                found[f"{self._names[pid]} {pid}"] = (slope * 60.0, float(late[-1, 1]))
        return found


def test_nothing_fails_grows_or_is_left_behind(
    plain_model_dir: Path, report_figure: Callable[[str], None], pytestconfig: pytest.Config
) -> None:
    seconds = 60.0 * pytestconfig.getoption("--soak-minutes")
    with ServerHome() as home, Server(home, str(plain_model_dir), SETTINGS) as server:
        watch = MemoryWatch(server)
        clients = Clients(server)
        started = time.monotonic()
        try:
            while (elapsed := time.monotonic() - started) < seconds:
                watch.sample(elapsed)
                time.sleep(SAMPLE_S)
        finally:
            clients.stop()
        report_figure(f"soak: {clients.num_turns} turns of {NUM_CLIENTS} clients in {seconds:.0f} s")
        assert not clients.faults, clients.faults[:5]
        check_flat(watch.slopes(seconds * WARM_SHARE), seconds * (1 - WARM_SHARE), report_figure)
        server.settle()
        check_nothing_is_left(server, home)
        server.stop()
        assert not strays(home)


def check_flat(slopes: dict[str, tuple[float, float]], seconds: float, report_figure: Callable[[str], None]) -> None:
    for name, (slope, last) in sorted(slopes.items(), key=lambda each: -each[1][0]):
        report_figure(f"soak: {slope:+6.2f} MiB/min, {last:6.0f} MiB at the end, {name}")
    growing = {name: slope for name, (slope, _) in slopes.items() if slope * seconds / 60.0 > MAX_GROWTH_MIB}
    assert not growing, f"these grow: {growing}"


def check_nothing_is_left(server: Server, home: ServerHome) -> None:
    """Both tiers have evicted; no block is held, no lease, no handoff, nothing was spilled by Ray."""
    store = server.store()
    assert store["state"] == "ok"
    assert store["counters"]["evicted_dram_extents"] > 0
    assert store["counters"]["evicted_disk_extents"] > 0
    assert store["counters"].get("quarantined_extents", 0) == 0
    assert store["dram_bytes"] <= store["dram_budget_bytes"]
    assert store["disk_bytes"] <= store["disk_budget_bytes"]
    for role in ("decode", "prefill"):
        wait_until(lambda role=role: server.counters()[role]["num_used_blocks"] == 0, f"{role} holds no block")  # type: ignore[misc]
        assert server.counters()[role]["num_admitted"] == 0
    wait_until(lambda: server.store()["handoff_bytes"] == 0, "no handoff is left")
    assert not [path for path in home.ray_directory.rglob("ray_spilled_objects*") if any(path.iterdir())]


def strays(home: ServerHome) -> list[str]:
    """After the end: what lies in the folder and not in the index, or the other way round, or was half written."""
    with sqlite3.connect(home.warehouse / "index.sqlite") as db:
        rows = {row[0] for row in db.execute("SELECT extent_id FROM extents")}
    db.close()
    files = {path.stem for path in home.extent_files()}
    return [*(rows ^ files), *(path.name for path in (home.warehouse / "tmp").iterdir())]
