"""What a bench says: figures beside what they are held against, for people and for programs.

A bench measures and does not judge: its exit status is 0 whatever the figures say, and a figure that could not
be measured is there with no value and the reason.
"""

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, TextIO

import psutil
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement. `ratio` is value over `against_value`, and higher is better unless said otherwise."""

    name: str
    value: float | None
    unit: str
    against: str | None = None
    against_value: float | None = None
    target: float | None = None
    """What the ratio should reach, or stay under if lower is better."""
    lower_is_better: bool = False
    reason: str | None = None
    """Why there is no value."""

    @property
    def ratio(self) -> float | None:
        if self.value is None or not self.against_value:
            return None
        return self.value / self.against_value

    @property
    def ok(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio <= self.target if self.lower_is_better else self.ratio >= self.target

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "ok": self.ok}


@dataclass
class Report:
    """All figures of one bench."""

    bench: str
    figures: list[Figure] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "version": version("tokenloft"),
            "machine": describe_machine(),
            "seconds": round(self.seconds, 1),
            "figures": [figure.as_json() for figure in self.figures],
        }

    def write(self, out: TextIO, *, as_json: bool) -> None:
        """One JSON object and nothing else, or a table."""
        if as_json:
            json.dump(self.as_json(), out, indent=2)
            out.write("\n")
        else:
            Console(file=out, highlight=False).print(self._table())

    def _table(self) -> Table:
        table = Table(title=f"bench {self.bench}, {self.seconds:.0f} s", title_justify="left")
        for column in ("figure", "value", "against", "ratio", "target"):
            table.add_column(column)
        for figure in self.figures:
            table.add_row(figure.name, *_cells(figure))
        return table


def _cells(figure: Figure) -> tuple[str, str, str, str]:
    if figure.value is None:
        return (f"not measured: {figure.reason}", "", "", "")
    against = f"{figure.against}: {figure.against_value:,.4g}" if figure.against_value is not None else ""
    ratio = f"{figure.ratio:.2f}" if figure.ratio is not None else ""
    sign = "<=" if figure.lower_is_better else ">="
    target = f"{sign} {figure.target:g}" if figure.target is not None else ""
    return (f"{figure.value:,.4g} {figure.unit}", against, ratio, target)


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - a device-like file, read by lines
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def interleaved(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each run's result, the runs taken in turn, so that a slow spell of the machine hits all."""
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    return {name: statistics.median(values) for name, values in results.items()}


def best_seconds(run: Callable[[], object], rounds: int) -> float:
    """The shortest of several runs: what the machine can do when nothing else is in the way."""
    seconds: list[float] = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def differences(times: Sequence[float]) -> list[float]:
    """Gaps between consecutive points in time."""
    return [b - a for a, b in itertools.pairwise(times)]
