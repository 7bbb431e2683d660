"""The eviction bench on small traces whose results are known from elsewhere."""

import io
import json
import random
from collections import OrderedDict
from pathlib import Path

import pytest

from cache.eviction import POLICIES
from serving.bench.block_trace import TraceRequest, best_hit_rate, endless_hit_rate, load_trace
from serving.bench.eviction import EvictionBenchOptions, Replay, SizeResult, figures_of, run_eviction_bench
from serving.cli import main
from serving.errors import BenchError

BLOCK = 16


def write_trace(path: Path, prompts: list[list[int]]) -> Path:
    """The last block of each prompt is half full."""
    entries = [{"timestamp": n, "input_length": len(p) * BLOCK - 8, "hash_ids": p} for n, p in enumerate(prompts)]
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return path


def sessions(num_requests: int, seed: int = 1) -> list[list[int]]:
    """Conversations that grow by some blocks each turn, some of them after a common beginning."""
    rng = random.Random(seed)
    new = iter(range(10, 1 << 30))
    running: list[list[int]] = []
    prompts: list[list[int]] = []
    for _ in range(num_requests):
        if len(running) < 8 or rng.random() < 0.2:
            running.append([0, 1] if rng.random() < 0.5 else [])
        session = rng.choice(running[-12:])
        session += [next(new) for _ in range(rng.randint(1, 4))]
        prompts.append(list(session))
        if len(session) > 30:
            running.remove(session)
    return prompts


def lru_hit_rate(requests: list[TraceRequest], num_blocks: int) -> float:
    """What an ordered dictionary makes of it."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        found = 0
        while found < len(request.block_ids) and request.block_ids[found] in held:
            found += 1
        hits += request.hit_tokens(found, BLOCK)
        for block_id in reversed(request.block_ids):
            held[block_id] = None
            held.move_to_end(block_id)
        while len(held) > num_blocks:
            held.popitem(last=False)
    return hits / sum(request.num_tokens for request in requests)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "trace.jsonl", sessions(600))


@pytest.mark.parametrize("num_blocks", [60, 150, 400])
def test_lru_does_what_an_ordered_dictionary_does(trace: Path, num_blocks: int) -> None:
    requests = load_trace(trace, BLOCK)
    replay = Replay(num_blocks, BLOCK, POLICIES["lru"])
    assert replay.run(requests) == lru_hit_rate(requests, num_blocks)
    replay.ledger.check_integrity()
    assert len(replay.ledger.held) <= num_blocks


@pytest.mark.parametrize("num_blocks", [60, 150, 400])
def test_nothing_is_above_opt_and_opt_is_not_above_a_cache_without_bounds(trace: Path, num_blocks: int) -> None:
    requests = load_trace(trace, BLOCK)
    opt = best_hit_rate(requests, BLOCK, num_blocks)
    for make_policy in POLICIES.values():
        assert 0 < Replay(num_blocks, BLOCK, make_policy).run(requests) <= opt
    assert opt <= endless_hit_rate(requests, BLOCK)
    assert best_hit_rate(requests, BLOCK, 1 << 20) == endless_hit_rate(requests, BLOCK)


def test_opt_by_hand() -> None:
    """Room for two: of 1, 2 and 3 the one needed last goes, so that 1 and 2 are found again and 3 is not."""
    requests = [TraceRequest((i,), BLOCK) for i in (1, 2, 3, 1, 2, 3)]
    assert best_hit_rate(requests, BLOCK, 2) == 2 / 6
    assert endless_hit_rate(requests, BLOCK) == 3 / 6


def test_all_figures_are_there(trace: Path) -> None:
    said: list[str] = []
    options = EvictionBenchOptions(trace, (60 * BLOCK, 1_000_000), BLOCK, plot_dir=trace.parent / "plots")
    report = run_eviction_bench(options, said.append)
    figures = {figure.name: figure for figure in report.figures}
    assert len(figures) == len(report.figures) == 2 * (2 * len(POLICIES)) + 2
    small = figures["hit rate 960, reuse"]
    assert small.value is not None
    assert 0 < small.value <= (small.against_value or 0.0)
    assert figures["closed distance 1M, reuse"].reason == "OPT is not above LRU"
    assert figures["closed distance average, reuse"].value is None, "all fits into the only size that counts"
    assert (trace.parent / "plots" / "eviction.png").read_bytes().startswith(b"\x89PNG")
    assert said[0] == "600 requests of trace.jsonl"
    assert "960 tokens, lru" in said


def test_the_average_is_over_the_sizes_that_count() -> None:
    rates = {"lru": 0.1, "reuse": 0.2, "s3fifo": 0.1}
    low = SizeResult(1_000_000, rates, opt=0.5, endless=0.6)  # type: ignore[arg-type]
    high = SizeResult(3_000_000, rates | {"reuse": 0.3}, opt=0.5, endless=0.6)  # type: ignore[arg-type]
    other = SizeResult(30_000_000, rates | {"reuse": 0.05}, opt=0.5, endless=0.6)  # type: ignore[arg-type]
    figures = {figure.name: figure for figure in figures_of([low, high, other])}
    average = figures["closed distance average, reuse"]
    assert average.value == pytest.approx(0.375)
    assert average.ok
    assert figures["above LRU at the worst size, reuse"].value == pytest.approx(-5)


def test_a_trace_without_reuse_is_no_hit_and_no_error(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "new.jsonl", [[2 * n, 2 * n + 1] for n in range(50)])
    report = run_eviction_bench(EvictionBenchOptions(path, (320,), BLOCK), lambda _: None)
    rates = [figure.value for figure in report.figures if figure.name.startswith("hit rate")]
    assert rates == [0.0] * (len(POLICIES) + 1)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "no JSON"),
        ("[]", "a request is a JSON object"),
        ('{"input_length": 5}', "hash_ids must be a list"),
        ('{"input_length": 5, "hash_ids": [1.5]}', "hash_ids must be a list"),
        ('{"input_length": -1, "hash_ids": [1]}', "input_length must be a number of tokens"),
        ('{"input_length": null, "hash_ids": [1]}', "input_length must be a number of tokens"),
    ],
)
def test_a_bad_line_is_named(trace: Path, capsys: pytest.CaptureFixture[str], line: str, complaint: str) -> None:
    trace.write_text(f"{trace.read_text().splitlines()[0]}\n\n{line}\n")
    assert main(["bench", "eviction", "--trace", str(trace), "--block-size", "16"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert f"{trace}, line 3: {complaint}" in said.err


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "holds no requests"), (b"\xff\xfe\x00", "is no text"), (None, "can't read")]
)
def test_a_file_that_is_no_trace_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchError, match=complaint):
        load_trace(path, BLOCK)


def test_blocks_of_another_size_are_noticed(trace: Path) -> None:
    with pytest.raises(BenchError, match=r"tokens a block, not 512: say how many with --block-size"):
        load_trace(trace, 512)


def test_ids_may_be_strings_and_a_repeated_one_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_length": 40, "hash_ids": ["a", 7, "a", 900000000000]}\n')
    assert load_trace(path, BLOCK) == [TraceRequest((0, 1, 2), 40)]


def test_the_command_prints_json_and_nothing_else(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "eviction", "--trace", str(trace), "--block-size", "16", "--sizes", "1K,0.002M", "--json"]
    assert main([*command, "--quick"]) == 0
    report = json.load(io.StringIO(capsys.readouterr().out))
    assert report["bench"] == "eviction"
    assert "hit rate 2000, lru" in {figure["name"] for figure in report["figures"]}


def test_a_size_that_is_none_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "eviction", "--trace", "t", "--sizes", "1M,none"])
    assert "'none' is no number of tokens such as 300000, 300K or 0.3M" in capsys.readouterr().err
