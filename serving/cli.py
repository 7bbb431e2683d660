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
from serving.config import Config, ConfigError, load_config
from serving.engine.families import UnsupportedModelError
from serving.errors import LaunchError
from serving.launch import serve
from serving.model_files import ModelError
from serving.ray_session import RaySetupError
from serving.terminal import Terminal
from serving.warehouse_command import show_stats

_EXAMPLES = """examples:
  tokenloft serve
  tokenloft serve --model ~/models/Qwen3-0.6B --port 8080
  tokenloft serve --config configs/local.yaml --set decode.replicas=2 --set cache.disk_bytes=20GiB
  tokenloft warehouse stats --json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    terminal = Terminal()
    try:
        run: Any = parsed.run
        run(parsed, terminal)
    except (CacheError, ConfigError, LaunchError, ModelError, RaySetupError, UnsupportedModelError) as error:
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


def _warehouse_stats(parsed: argparse.Namespace, terminal: Terminal) -> None:
    show_stats(config_of(parsed), as_json=parsed.json, out=sys.stdout)
