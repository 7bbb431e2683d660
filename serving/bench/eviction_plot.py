"""The eviction bench as a picture. Needs matplotlib, which nothing else of the project does."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def plot_hit_rates(sizes: Sequence[int], curves: Mapping[str, Sequence[float]], directory: Path) -> Path:
    """Token hit rates over sizes in tokens, one curve each, as a PNG in `directory`, which is made. Its path."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rates in curves.items():
        axes.plot(sizes, [100 * rate for rate in rates], marker="o", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("token hit rate, %")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "eviction.png"
    figure.savefig(path, dpi=130)
    return path
