"""The encryption bench: what it measures is encrypted, and what it is held against is not."""

from pathlib import Path

from cache.extent import LOCKED_MAGIC, MAGIC
from serving.bench.warehouse_encryption import measure_encryption
from serving.bench.warehouse_io import Prompt
from tests.cache.stores import extent_files


def test_it_holds_encrypted_against_plain(tmp_path: Path) -> None:
    figures = measure_encryption(tmp_path, Prompt.of(64), rounds=1)
    assert [figure.name for figure in figures] == ["commit, encrypted", "load, page cache, encrypted"]
    for figure in figures:
        assert (figure.against, figure.unit, figure.target) == ("not encrypted", "GB/s", None)
        assert figure.ratio is not None and figure.ratio > 0
    assert {path.read_bytes()[:8] for path in extent_files(tmp_path / "loads-True")} == {LOCKED_MAGIC}
    assert {path.read_bytes()[:8] for path in extent_files(tmp_path / "loads-False")} == {MAGIC}
