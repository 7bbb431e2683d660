"""The regret bench runs from end to end on a tiny model, and its link is as slow as it is told."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from serving.bench.regret import Link, RegretBenchOptions, run_regret_bench, summarise
from serving.bench.report import Figure


def test_every_cell_is_held_against_the_better_way(tiny_model_dir: Path) -> None:
    progress: list[str] = []
    options = RegretBenchOptions(tiny_model_dir, 1, (64, 128), (2e6, None), rounds=1, chunk_tokens=32)
    report = run_regret_bench(options, progress.append)
    assert len(progress) == 1 + 4
    cells = {figure.name: figure for figure in report.figures}
    assert len(cells) == 4 * 3 + 3
    for name in ("64 tokens, 2 MB/s", "128 tokens, unlimited"):
        alone = [cells[f"{name}: load alone"].value, cells[f"{name}: compute alone"].value]
        assert cells[name].against_value == min(value for value in alone if value is not None)
        assert cells[name].ratio is not None
    ratios = [figure.ratio for figure in report.figures[:-3] if figure.ratio is not None]
    assert cells["worst of all"].value == max(ratios)
    assert cells["worst of all"].lower_is_better


def test_a_link_brings_no_more_than_its_speed_whoever_asks() -> None:
    link, image = Link(), np.zeros(100_000, np.uint8)
    started = time.perf_counter()
    assert link.fetch(image) is image
    link.bytes_per_s = 1e6
    link.fetch(image)
    link.fetch(image)
    assert time.perf_counter() - started >= 0.2
    link.wait()


def test_an_idle_link_saves_nothing_up() -> None:
    """A pause is no credit: what comes after it takes as long as ever."""
    link, image = Link(), np.zeros(50_000, np.uint8)
    link.bytes_per_s = 1e6
    link.fetch(image)
    time.sleep(0.1)
    started = time.perf_counter()
    link.fetch(image)
    assert time.perf_counter() - started >= 0.05


def test_several_readers_share_a_link() -> None:
    link, image = Link(), np.zeros(30_000, np.uint8)
    link.bytes_per_s = 1e6
    started = time.perf_counter()
    with ThreadPoolExecutor(3) as readers:
        list(readers.map(link.fetch, [image] * 6))
    assert time.perf_counter() - started >= 0.18


def test_the_summary_is_of_the_cells_alone() -> None:
    figures = [Figure(str(at), value, "s", "load alone", 2.0, 1.25) for at, value in enumerate((1.0, 2.2, 2.0))]
    median, worst, best = summarise([*figures, Figure("0: load alone", 9.0, "s")])
    assert (median.value, worst.value, best.value) == (1.0, 1.1, 0.5)
    assert [figure.ok for figure in (median, worst, best)] == [True, True, True]
    assert summarise([Figure("0", 3.0, "s", "load alone", 2.0, 1.25)])[1].ok is False


@pytest.mark.parametrize("is_quick", [True, False])
def test_options(tmp_path: Path, is_quick: bool) -> None:
    options = RegretBenchOptions.of(tmp_path, num_threads=None, is_quick=is_quick)
    assert options.num_threads >= 1
    assert (options.rounds < 3) is is_quick
