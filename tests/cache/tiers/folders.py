"""Warehouse folders for tests: six extents, a tier's verbs, owners in other processes."""

import subprocess
import sys
from pathlib import Path

from cache.extent import ExtentHeader, verify_image
from cache.tiers.disk import FileTier
from tests.cache.chains import header_of, sealed_image

HEADERS = [header_of([number * 100 + i for i in range(8)]) for number in range(1, 7)]
A, B, C = HEADERS[:3]


def write(tier: FileTier, *headers: ExtentHeader) -> None:
    """Each by itself, durable."""
    for header in headers:
        tier.write(header, sealed_image(header))
        assert tier.commit() == [header.extent_id]


def recovered(folder: Path) -> list[str]:
    """Open, list, close: each listed extent is whole, and there is no file besides."""
    tier = FileTier(folder)
    ids = [header.extent_id for header in tier.recover()]
    for extent_id in ids:
        verify_image(extent_id, tier.read(extent_id))
    assert sorted(ids) == sorted(path.stem for path in files(folder))
    assert list((folder / "tmp").iterdir()) == []
    tier.close()
    return ids


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("extents/*/*/*"))


def ids(*headers: ExtentHeader) -> list[str]:
    return [header.extent_id for header in headers]


def spawn(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """Run `code` in another process of this interpreter; it says `ready` when it is."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
