"""`tokenloft bench NAME`: the options of the benches, and the calls."""

import argparse
import sys
from pathlib import Path
from typing import Any

from serving.errors import BenchError
from serving.model_store import ALIAS, prepare_model
from serving.terminal import Terminal

_EXAMPLES = """examples:
  tokenloft bench engine --quick
  tokenloft bench warehouse --json > warehouse.json
  tokenloft bench warehouse --folder /mnt/nvme --plot plots
"""


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
    _add_warehouse(names)


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
    command.add_argument("--model", metavar="M", default=ALIAS, help="as for serve (default %(default)s)")
    command.add_argument("--threads", metavar="N", type=int, help="of both sides (default: all cores)")
    command.set_defaults(run=_bench_engine)


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
    command.set_defaults(run=_bench_warehouse)


def _bench_engine(parsed: argparse.Namespace, terminal: Terminal) -> None:
    model = prepare_model(parsed.model, terminal)
    from serving.bench.engine import EngineBenchOptions, run_engine_bench  # torch: seconds that other commands save

    options = EngineBenchOptions.of(model.directory, num_threads=parsed.threads, is_quick=parsed.quick)
    run_engine_bench(options, terminal.step).write(sys.stdout, as_json=parsed.json)


def _bench_warehouse(parsed: argparse.Namespace, terminal: Terminal) -> None:
    model_dir = None if parsed.quick else prepare_model(parsed.model, terminal).directory
    from serving.bench.warehouse import WarehouseBenchOptions, run_warehouse_bench

    options = WarehouseBenchOptions.of(parsed.folder, model_dir, is_quick=parsed.quick)
    try:
        report = run_warehouse_bench(options, terminal.step, parsed.plot)
    except (OSError, ModuleNotFoundError) as error:
        raise BenchError(f"the bench could not be run: {error}") from error
    report.write(sys.stdout, as_json=parsed.json)
