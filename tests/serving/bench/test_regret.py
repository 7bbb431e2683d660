"""The regret bench runs from end to end on a tiny model, and its link is as slow as it is told."""

import time
from pathlib import Path

import numpy as np
import pytest

from serving.bench.regret import Link, RegretBenchOptions, run_regret_bench


def test_every_cell_is_held_against_the_better_way(tiny_model_dir: Path) -> None:
    progress: list[str] = []
    options = RegretBenchOptions(tiny_model_dir, 1, (64, 128), (2e6, None), rounds=1, chunk_tokens=32)
    report = run_regret_bench(options, progress.append)
    assert len(progress) == 1 + 4
    cells = {figure.name: figure for figure in report.figures}
    assert len(cells) == 4 * 3 + 2
    for name in ("64 tokens, 2 MB/s", "128 tokens, unlimited"):
        alone = [cells[f"{name}: load alone"].value, cells[f"{name}: compute alone"].value]
        assert cells[name].against_value == min(value for value in alone if value is not None)
        assert cells[name].ratio is not None
    ratios = [figure.ratio for figure in report.figures[:-2] if figure.ratio is not None]
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


@pytest.mark.parametrize("is_quick", [True, False])
def test_options(tmp_path: Path, is_quick: bool) -> None:
    options = RegretBenchOptions.of(tmp_path, num_threads=None, is_quick=is_quick)
    assert options.num_threads >= 1
    assert (options.rounds < 3) is is_quick
