"""The warehouse bench in small: every figure is there beside its limit, and the chart is drawn."""

from pathlib import Path

import pytest

from cache.client import WarehouseClient
from serving.bench.warehouse import WarehouseBenchOptions, run_warehouse_bench
from serving.bench.warehouse_index import CHAIN_BLOCKS, chain_tokens, measure_index
from serving.bench.warehouse_io import Prompt, load, open_on_disk

SMALL = (2 * CHAIN_BLOCKS, 8 * CHAIN_BLOCKS)


def test_all_figures_are_measured(tmp_path: Path) -> None:
    said: list[str] = []
    options = WarehouseBenchOptions(tmp_path, None, 128, 1, SMALL, with_ray=False)
    report = run_warehouse_bench(options, said.append, tmp_path / "plots")
    figures = {figure.name: figure for figure in report.figures}
    for name in (
        "commit, one at a time",
        "load, cold disk",
        "load, page cache",
        "step loop's time for a commit of 128 tokens",
    ):
        assert figures[name].value is not None
        assert figures[name].ratio is not None
    assert sum(figure.target is not None for figure in report.figures) >= 8
    assert sum(name.startswith("open an index of") for name in figures) == len(SMALL)
    assert sum(name.startswith("lookup of 256 blocks, p99") for name in figures) == len(SMALL)
    assert (tmp_path / "plots" / "warehouse-growth.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plots"], "nothing is left behind"
    assert len(said) >= 5, "progress is said before each part"


def test_an_index_has_as_many_blocks_as_asked_and_branches(tmp_path: Path) -> None:
    figures = measure_index(8 * CHAIN_BLOCKS, tmp_path / "index")
    assert 8 * CHAIN_BLOCKS <= figures.num_blocks < 9 * CHAIN_BLOCKS
    half = len(chain_tokens(3)) // 2
    assert (chain_tokens(3)[:half] == chain_tokens(2)[:half]).all()
    assert (chain_tokens(3)[half:] != chain_tokens(2)[half:]).any()


def test_a_load_that_brings_too_little_is_no_figure(tmp_path: Path) -> None:
    prompt = Prompt.of(128)
    with open_on_disk(tmp_path / "w", prompt) as store:
        client = WarehouseClient(store)
        grant = client.lookup(prompt.query())
        Path(grant.pieces[-1].source).unlink()
        with pytest.raises(ValueError, match="blocks came back"):
            load(client, prompt, grant)
