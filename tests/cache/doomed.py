"""Node stores that are killed: a warm process that starts one after the other, and what each does until then.

    test --job--> nursery --fork--> a store at work --told--> nursery --told, status--> test

The nursery has imported everything, so that a store is at work within milliseconds; each runs in a process
of its own, and SIGKILL ends it at a given moment or at a given step of its work on the disk.
"""

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.client import WarehouseClient
from cache.events import Tier
from cache.extent import Origin, allocate_image
from cache.messages import PurgeQuery
from cache.node_store import NodeStore
from cache.occupancy import Budgets
from cache.tiers.files import Files, write_all
from cache.tiers.memory import MemoryTier
from tests.cache.aftermath import Aftermath, Witness, fill_true, on_disk_ids, read_true
from tests.cache.chains import BLOCK_BYTES, BLOCK_SIZE, header_of, offer, query, store_config

BLOCKS = 2
IMAGE = 4096 + BLOCKS * BLOCK_BYTES
LIMITS = {
    "tiny": Budgets(10 * IMAGE, 16 * IMAGE, 3 * IMAGE, BLOCKS * BLOCK_BYTES, 2, 4 * IMAGE),
    "roomy": Budgets(400 * IMAGE, 20_000 * IMAGE, 3 * IMAGE, BLOCKS * BLOCK_BYTES, 4),
}


NUM_PROMPTS = 24
"""One store works on these: from `first_chain` on."""


@dataclass(frozen=True)
class Job:
    """One store's life. Killed `kill_after_s` after its birth or its opening, or at step `kill_at` on the disk."""

    folder: str
    kind: str
    """One of `LIMITS`."""
    seed: int
    fsync: bool = False
    first_chain: int = 0
    kill_after_s: float | None = None
    lets_open: bool = True
    kill_at: int | None = None


@dataclass(frozen=True)
class Told:
    """What a store said before its end, and its exit status."""

    messages: list[tuple[str, str]]
    status: int


def prompt(number: int) -> list[int]:
    """Four prompts share their first six tokens, so that they fork inside a block."""
    trunk = [number // 4 * 1000 + i for i in range(6)]
    return trunk + [number * 1000 + 500 + i for i in range(2 + number * 7 % 15)]


class DeadlySteps(Files):
    """Kills its process before the step `kill_at`; a write has a step in its middle too.

    Syncs are steps and nothing more: what a process has written outlives it.
    """

    def __init__(self, kill_at: int) -> None:
        self._left = kill_at

    def step(self, _: object = None) -> None:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, path: Path, content: bytes | memoryview) -> None:
        self.step()
        half = len(content) // 2
        super().write(path, content[:half])
        self.step()
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            write_all(fd, content[half:])
        finally:
            os.close(fd)

    def sync(self, path: Path) -> None:
        self.step()

    def rename(self, source: Path, target: Path) -> None:
        self.step()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self.step()
        super().unlink(path)

    def make_folder(self, path: Path) -> bool:
        self.step()
        return super().make_folder(path)


def open_doomed(job: Job, tell: Callable[[str, str], None]) -> NodeStore:
    files = DeadlySteps(job.kill_at) if job.kill_at is not None else Files()
    tier = Witness(Path(job.folder), tell, fsync=job.fsync, files=files, lock_wait_s=5.0)
    if isinstance(files, DeadlySteps):
        tier._db._db.set_trace_callback(files.step)
    config = store_config(LIMITS[job.kind], commit_interval_s=0.003, store_wait_s=0.05)
    return NodeStore(config, MemoryTier(), tier)


def live(job: Job, tell: Callable[[str, str], None]) -> None:
    """Store, load, evict, purge, until the kill."""
    rng = random.Random(job.seed)
    store = open_doomed(job, tell)
    tell("O", "open")
    client, found = WarehouseClient(store), Aftermath()
    stored: list[int] = []
    for turn in range(1 << 30):
        number = job.first_chain + rng.randrange(NUM_PROMPTS)
        act = rng.random()
        if act < 0.55:
            owner = f"request {turn}" if rng.random() < 0.2 else None
            of = Origin("", f"session {number}")
            if client.store(offer(prompt(number), handoff_owner=owner, origin=of), fill_true):
                stored.append(number)
            if owner:
                client.release(owner)
        elif act < 0.9:
            read_true(client, query(prompt(number)), found)
        elif act < 0.97 and store.flush(2.0) and job.kind == "roomy":
            for number in stored:
                tell("F", str(number))
            stored.clear()
        elif job.kind == "tiny":
            store.purge(PurgeQuery(session=f"session {number}"), wait_s=2.0)
        for fault in found.faults:
            tell("!", fault.replace("\n", " "))
        found.faults.clear()


def live_by_steps(job: Job, tell: Callable[[str, str], None]) -> None:
    """A fixed piece of work that goes through everything a store does with its disk, and ends by itself."""
    store = open_doomed(job, tell)
    client = WarehouseClient(store)
    for number in (0, 1, 4, 5):
        client.store(offer(prompt(number), origin=Origin("", f"session {number}")), fill_true)
    store.flush()
    store.report_bad(next(iter(on_disk_ids(store))), Tier.DISK, "a test says so")
    for number in (8, 9, 12):  # more than fits: evictions
        client.store(offer(prompt(number)), fill_true)
        store.flush()
    store.purge(PurgeQuery(session="session 4"))
    client.store(offer(prompt(4)), fill_true)
    store.close()


def learn(prompts: Iterable[list[int]]) -> None:
    """Have the true KV of these at hand, which takes much longer than all that a store does with it."""
    for tokens in prompts:
        for header in (header_of(tokens), header_of(tokens, first=(len(tokens) - 1) // BLOCK_SIZE)):
            fill_true(header, allocate_image(header))


def serve() -> None:
    """Start the stores that the lines on standard input ask for, one after the other."""
    for line in sys.stdin:
        job = Job(**json.loads(line))
        learn(prompt(job.first_chain + i) for i in range(NUM_PROMPTS))
        told = _start_and_kill(job)
        sys.stdout.write(json.dumps(asdict(told)) + "\n")
        sys.stdout.flush()


def _start_and_kill(job: Job) -> Told:
    reader, writer = os.pipe()
    born_at = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _live_and_exit(job, writer)
    os.close(writer)
    kill_at = None if job.lets_open or job.kill_after_s is None else born_at + job.kill_after_s
    said = b""
    while True:
        left = max(0.0, kill_at - time.monotonic()) if kill_at is not None else None
        if not select.select([reader], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            kill_at = None
        elif chunk := os.read(reader, 65536):
            if not said and job.lets_open and job.kill_after_s is not None:
                kill_at = time.monotonic() + job.kill_after_s
            said += chunk
        else:
            break
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    lines = said.decode().splitlines()
    return Told([(line[0], line[1:]) for line in lines], os.waitstatus_to_exitcode(status))


def _live_and_exit(job: Job, writer: int) -> None:
    status = 1
    try:
        work = live if job.kill_at is None else live_by_steps
        work(job, lambda sign, text: write_all(writer, f"{sign}{text}\n".encode()))
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        os._exit(status)


@contextmanager
def nursery() -> Iterator[Callable[[Job], Told]]:
    """Gives the function that starts a store, kills it and says what it told."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cache.doomed"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None

    def start(job: Job) -> Told:
        stdin.write(json.dumps(asdict(job)) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        return Told([(sign, text) for sign, text in answer["messages"]], answer["status"])

    try:
        yield start
    finally:
        stdin.close()
        process.wait(30)
        stdout.close()


if __name__ == "__main__":
    serve()
