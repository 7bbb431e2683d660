"""What encryption at rest costs: commits and loads with it beside the same ones without, in turn, on the same bytes.

Loads come from the page cache: from a cold disk, decrypting hides behind reading even more.
"""

import os
import secrets
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from cache.client import WarehouseClient
from cache.encryption import KEY_BYTES, Vault
from cache.extent import ExtentHeader, Image
from cache.tiers.disk import FileTier
from serving.bench.report import Figure
from serving.bench.warehouse_io import EXTENT_BYTES, Prompt, load, open_on_disk


def measure_encryption(folder: Path, prompt: Prompt, rounds: int) -> list[Figure]:
    """Bandwidths of an encrypted disk tier, held against those of a plain one."""
    vault = Vault(secrets.token_bytes(KEY_BYTES))
    return [_commits(folder, prompt, rounds, vault), _loads(folder, prompt, rounds, vault)]


def _commits(folder: Path, prompt: Prompt, rounds: int, vault: Vault) -> Figure:
    images = list(prompt.images(EXTENT_BYTES))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with closing(FileTier(folder / "plain")) as plain, closing(FileTier(folder / "encrypted", vault=vault)) as ours:
        for _ in range(rounds):
            for header, image in images:
                seconds[False].append(_seconds(partial(_commit, plain, header, image)))
                seconds[True].append(_seconds(partial(_commit, ours, header, image)))
            for header, _ in images:
                plain.delete(header.extent_id)
                ours.delete(header.extent_id)
            os.sync()  # freeing the blocks would be paid by whichever side is next
    return _figure("commit, encrypted", statistics.mean(len(image) for _, image in images), seconds)


def _loads(folder: Path, prompt: Prompt, rounds: int, vault: Vault) -> Figure:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with ExitStack() as stack:
        runs: dict[bool, Callable[[], None]] = {}
        for is_encrypted, used in ((False, None), (True, vault)):
            store = stack.enter_context(open_on_disk(folder / f"loads-{is_encrypted}", prompt, used))
            client = WarehouseClient(store, vault=used)
            runs[is_encrypted] = partial(load, client, prompt, client.lookup(prompt.query()))
            runs[is_encrypted]()
        for _ in range(rounds):
            for is_encrypted, run in runs.items():
                seconds[is_encrypted].append(_seconds(run))
    return _figure("load, page cache, encrypted", prompt.kv_bytes, seconds)


def _commit(tier: FileTier, header: ExtentHeader, image: Image) -> None:
    tier.write(header, image)
    tier.commit()


def _figure(name: str, num_bytes: float, seconds: dict[bool, list[float]]) -> Figure:
    plain, encrypted = (num_bytes / statistics.median(seconds[each]) / 1e9 for each in (False, True))
    return Figure(name, encrypted, "GB/s", against="not encrypted", against_value=plain)


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
