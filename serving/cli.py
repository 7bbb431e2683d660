"""The `tokenloft` command. Parses, calls, turns expected errors into one line and an exit status.

Exit statuses: 0 done, 1 it could not be done (the line says why), 2 the command line is wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.errors import CacheError
from serving.chat_command import Chat, load_messages, typed_lines
from serving.config import Config, ConfigError, load_config
from serving.engine.families import UnsupportedModelError
from serving.errors import LaunchError
from serving.launch import serve
from serving.model_files import ModelError
from serving.model_store import ALIAS, prepare_model
from serving.ray_session import RaySetupError
from serving.sdk import Tokenloft, TokenloftError
from serving.terminal import Terminal
from serving.warehouse_command import show_stats

_EXAMPLES = """examples:
  tokenloft serve
  tokenloft serve --model ~/models/Qwen3-0.6B --port 8080
  tokenloft serve --config configs/local.yaml --set decode.replicas=2 --set cache.disk_bytes=20GiB
  tokenloft chat
  tokenloft warehouse stats --json
  tokenloft bench engine --quick
"""


EXPECTED = (CacheError, ConfigError, LaunchError, ModelError, RaySetupError, TokenloftError, UnsupportedModelError)
"""Errors whose message is all that a person needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    terminal = Terminal()
    try:
        run: Any = parsed.run
        run(parsed, terminal)
    except EXPECTED as error:
        terminal.error(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="tokenloft",
        description="Serve language models whose turns reuse stored KV.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_chat(commands)
    _add_bench(commands)
    warehouse = commands.add_parser("warehouse", help="look at the warehouse of KV blocks")
    actions = warehouse.add_subparsers(required=True, metavar="ACTION")
    stats = actions.add_parser("stats", help="what it holds, from the folder and from a running server")
    stats.add_argument("--json", action="store_true", help="one JSON object on standard output")
    _add_config_options(stats)
    stats.set_defaults(run=_warehouse_stats)
    return parser


def _add_serve(commands: Any) -> None:
    command = commands.add_parser(
        "serve",
        help="bring the server up",
        description="Bring the server up on this machine, or on the Ray that ray.address names. Ctrl-C ends it.",
        epilog="--set section.key=value sets any key of the config file; configs/local.yaml explains them.",
    )
    command.add_argument("--model", metavar="M", help="local folder, hub id, or smollm2-135m-instruct (the default)")
    command.add_argument("--host", metavar="H", help="address to listen on (default 127.0.0.1)")
    command.add_argument("--port", metavar="P", help="port to listen on (default 8000; 0: any free one)")
    _add_config_options(command)
    command.set_defaults(run=_serve)


def _add_chat(commands: Any) -> None:
    command = commands.add_parser(
        "chat",
        help="talk to a server, and see what each answer reused",
        description="A conversation in the terminal. /help lists its commands; in a pipe, each line is a message.",
    )
    command.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default %(default)s)")
    command.add_argument("--api-key", help="if the server asks for one")
    command.add_argument("--load", metavar="FILE", type=Path, help="go on from what /save wrote")
    command.add_argument(
        "--max-tokens", metavar="N", type=int, help="longest answer (default: what the context leaves)"
    )
    command.add_argument("--temperature", metavar="T", type=float, help="0 is greedy (default 1)")
    command.set_defaults(run=_chat)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure the paths that the server runs")
    names = bench.add_subparsers(required=True, metavar="NAME")
    engine = names.add_parser(
        "engine",
        help="prefill and decode, beside transformers and the roofline",
        description="Prefill and decode through the engine, interleaved with transformers' generate, in one run.",
    )
    engine.add_argument("--quick", action="store_true", help="one round, shorter prompts")
    engine.add_argument("--json", action="store_true", help="one JSON object on standard output")
    engine.add_argument("--model", metavar="M", default=ALIAS, help="as for serve (default %(default)s)")
    engine.add_argument("--threads", metavar="N", type=int, help="of both sides (default: all cores)")
    engine.set_defaults(run=_bench_engine)


def _add_config_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", type=Path, help="config file in YAML")
    command.add_argument("--warehouse", metavar="DIR", help="folder of the warehouse's disk tier")
    command.add_argument("--set", metavar="A.B=C", action="append", default=[], help="set one key of the config")


def config_of(parsed: argparse.Namespace) -> Config:
    """The config that the options describe; named options win over --set, which wins over the file."""
    named = {"model.name": "model", "http.host": "host", "http.port": "port", "cache.directory": "warehouse"}
    overrides = list(parsed.set)
    for key, option in named.items():
        value = getattr(parsed, option, None)
        if value is not None:
            # Quoted, or YAML would read the path ~ as null; a port is a number and stays bare.
            overrides.append(f"{key}={value}" if option == "port" else f"{key}={json.dumps(value)}")
    return load_config(parsed.config, overrides)


def _serve(parsed: argparse.Namespace, terminal: Terminal) -> None:
    serve(config_of(parsed), terminal)


def _chat(parsed: argparse.Namespace, terminal: Terminal) -> None:
    messages = load_messages(parsed.load)
    with Tokenloft(parsed.url, api_key=parsed.api_key) as client:
        terminal.hint(f"{client.model} at {parsed.url}; /help lists the commands")
        given = {"max_tokens": parsed.max_tokens, "temperature": parsed.temperature}
        options = {name: value for name, value in given.items() if value is not None}
        Chat(client, terminal, sys.stdout, messages, options).run(typed_lines(terminal))


def _bench_engine(parsed: argparse.Namespace, terminal: Terminal) -> None:
    model = prepare_model(parsed.model, terminal)
    from serving.bench.engine import EngineBenchOptions, run_engine_bench  # torch: seconds that other commands save

    options = EngineBenchOptions.of(model.directory, num_threads=parsed.threads, is_quick=parsed.quick)
    run_engine_bench(options, terminal.step).write(sys.stdout, as_json=parsed.json)


def _warehouse_stats(parsed: argparse.Namespace, terminal: Terminal) -> None:
    show_stats(config_of(parsed), as_json=parsed.json, out=sys.stdout)
