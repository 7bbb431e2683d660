"""The `tokenloft` command. Parses, calls, turns expected errors into one line and an exit status.

Exit statuses: 0 done, 1 it could not be done (the line says why) or something is bad, 2 the command line is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.errors import CacheError
from serving.bench_cli import add_benches
from serving.chat_command import Chat, load_messages, typed_lines
from serving.cli_options import add_config_options, config_of
from serving.config import ConfigError
from serving.engine.families import UnsupportedModelError
from serving.errors import BenchError, LaunchError
from serving.launch import serve
from serving.model_files import ModelError
from serving.ray_session import RaySetupError
from serving.sdk import Tokenloft, TokenloftError
from serving.terminal import Terminal
from serving.warehouse_cli import add_warehouse
from serving.warehouse_command import ServerError

_EXAMPLES = """examples:
  tokenloft serve
  tokenloft serve --model ~/models/Qwen3-0.6B --port 8080
  tokenloft serve --config configs/local.yaml --set decode.replicas=2 --set cache.disk_bytes=20GiB
  tokenloft chat
  tokenloft warehouse stats --json
  tokenloft warehouse verify --rate 200MB
  tokenloft bench engine --quick
  tokenloft bench warehouse --json
"""


EXPECTED = (
    BenchError,
    CacheError,
    ConfigError,
    LaunchError,
    ModelError,
    RaySetupError,
    ServerError,
    TokenloftError,
    UnsupportedModelError,
)
"""Errors whose message is all that a person needs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parsed = build_parser().parse_args(arguments)
    terminal = Terminal()
    try:
        run: Any = parsed.run
        status: int | None = run(parsed, terminal)
    except EXPECTED as error:
        terminal.error(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    return status or 0


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
    add_benches(commands)
    add_warehouse(commands)
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
    add_config_options(command)
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


def _serve(parsed: argparse.Namespace, terminal: Terminal) -> None:
    serve(config_of(parsed), terminal)


def _chat(parsed: argparse.Namespace, terminal: Terminal) -> None:
    messages = load_messages(parsed.load)
    with Tokenloft(parsed.url, api_key=parsed.api_key) as client:
        terminal.hint(f"{client.model} at {parsed.url}; /help lists the commands")
        given = {"max_tokens": parsed.max_tokens, "temperature": parsed.temperature}
        options = {name: value for name, value in given.items() if value is not None}
        Chat(client, terminal, sys.stdout, messages, options).run(typed_lines(terminal))
