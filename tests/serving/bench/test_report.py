"""The language of benches: what a figure says, and what goes to standard output."""

import io
import json

from serving.bench.report import Figure, Report, interleaved

SPEED = Figure("prefill", 120.0, "tokens/s", "transformers", 100.0, target=1.1)
STEP = Figure("step", 60.0, "ms", "transformers", 50.0, target=1.0, lower_is_better=True)
MISSING = Figure("decode", None, "ms", "vLLM", 50.0, target=1.0, reason="vLLM is not installed")


def test_a_ratio_is_value_over_what_it_is_held_against() -> None:
    assert (SPEED.ratio, SPEED.ok) == (1.2, True)
    assert (STEP.ratio, STEP.ok) == (1.2, False)
    assert (MISSING.ratio, MISSING.ok) == (None, None)
    assert Figure("alone", 1.0, "GB/s").ratio is None


def test_json_is_one_object_and_nothing_else() -> None:
    out = io.StringIO()
    Report("engine", [SPEED, MISSING], seconds=1.25).write(out, as_json=True)
    report = json.loads(out.getvalue())
    assert report["bench"] == "engine"
    assert report["machine"]["cores"] >= 1
    assert report["figures"][0]["ratio"] == 1.2
    assert report["figures"][1] | {"value": None, "reason": "vLLM is not installed"} == report["figures"][1]


def test_a_table_names_what_was_not_measured() -> None:
    out = io.StringIO()
    Report("engine", [SPEED, STEP, MISSING]).write(out, as_json=False)
    assert "not measured" in out.getvalue()


def test_interleaved_takes_the_median_of_runs_in_turn() -> None:
    order: list[str] = []

    def run(name: str, values: list[float]) -> float:
        order.append(name)
        return values.pop(0)

    a, b = [1.0, 9.0, 2.0], [5.0, 4.0, 6.0]
    assert interleaved({"a": lambda: run("a", a), "b": lambda: run("b", b)}, 3) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 3
