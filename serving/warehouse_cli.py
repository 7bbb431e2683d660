"""The command line of `tokenloft warehouse`: parses, and hands over to `warehouse_command` and `warehouse_upkeep`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cache.hashing import HASH_BYTES, BlockHash
from serving.cli_options import add_config_options, config_of
from serving.config import parse_bytes
from serving.terminal import Terminal
from serving.warehouse_command import show_stats
from serving.warehouse_upkeep import Output, Selection, export, import_, purge, rebuild, verify

_EXAMPLES = """examples:
  tokenloft warehouse stats
  tokenloft warehouse verify --rate 200MB
  tokenloft warehouse purge --session my-agent
  tokenloft warehouse purge --tenant --api-key KEY
  tokenloft warehouse export monday.tar --session my-agent
  tokenloft warehouse import monday.tar --warehouse ~/elsewhere
"""
_RATE = "200MB"


def add_warehouse(commands: Any) -> None:
    """The command and its actions."""
    warehouse = commands.add_parser(
        "warehouse",
        help="look at the warehouse of KV blocks, check it, delete from it",
        description="Look after the warehouse. Its folder is the config's, or the one that --warehouse names.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = warehouse.add_subparsers(required=True, metavar="ACTION")
    _add(actions, "stats", _stats, "what it holds, from the folder and from a running server")
    command = _add(
        actions,
        "verify",
        _verify,
        "read everything and check it; status 1 if something is bad",
        "Bad extents are set aside in the folder's quarantine, so that they are computed again. Beside a running "
        "server they are only told: it sets them aside itself when it comes upon them.",
    )
    command.add_argument(
        "--rate", type=_rate, default=_rate(_RATE), metavar="SIZE", help=f"most that is read a second (default {_RATE})"
    )
    _add(
        actions,
        "rebuild",
        _rebuild,
        "make the index anew from the files; no server may run on the folder",
        "A damaged index is rebuilt by itself at the next start. This is for one that is whole and wrong.",
    )
    command = _add(
        actions,
        "purge",
        _purge,
        "delete a session's, a tenant's or a model's KV, and print a receipt",
        "Where a server runs on the folder it is asked to, and deletes from its memory too: then no more than what "
        "the API key stored.",
    )
    _add_selection(command, is_needed=True)
    command = _add(
        actions,
        "export",
        _export,
        "write extents into a tar, verified; also beside a running server",
        "All extents, or those of a session, a tenant or a fingerprint.",
    )
    command.add_argument("archive", type=Path, metavar="FILE.tar", help="must not exist yet")
    _add_selection(command, is_needed=False)
    command = _add(
        actions,
        "import",
        _import,
        "add the extents of a tar that are missing, within the budget",
        "No server may run on the folder. Import only what you trust: an extent's checksum says that it is as it was "
        "exported, not that the model would have computed it.",
    )
    command.add_argument("archive", type=Path, metavar="FILE.tar")


def _add(actions: Any, name: str, run: Any, summary: str, description: str = "") -> argparse.ArgumentParser:
    text = f"{summary[0].upper()}{summary[1:]}. {description}"
    command: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=text)
    command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_config_options(command)
    command.set_defaults(run=run)
    return command


def _add_selection(command: argparse.ArgumentParser, *, is_needed: bool) -> None:
    which = command.add_mutually_exclusive_group(required=is_needed)
    which.add_argument("--session", metavar="ID", help="what was stored under this x-session-id")
    which.add_argument("--tenant", action="store_true", help="all that was stored with the API key")
    which.add_argument("--fingerprint", type=_fingerprint, metavar="HEX", help="of one model, as `stats` names it")
    which.add_argument("--all", action="store_true", help="everything" if is_needed else "everything (the default)")
    command.add_argument("--api-key", metavar="KEY", help="whose (default: the first of http.api_keys)")


def _rate(text: str) -> int:
    try:
        num_bytes = int(text) if text.isdecimal() else parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(num_bytes, int) or num_bytes <= 0:
        raise argparse.ArgumentTypeError("should be more than nothing")
    return num_bytes


def _fingerprint(text: str) -> BlockHash:
    try:
        root_hash = bytes.fromhex(text)
    except ValueError:
        root_hash = b""
    if len(root_hash) != HASH_BYTES:
        raise argparse.ArgumentTypeError(f"should be {2 * HASH_BYTES} hex digits, as `tokenloft warehouse stats` shows")
    return BlockHash(root_hash)


def _selection(parsed: argparse.Namespace) -> Selection:
    is_narrowed = parsed.session is not None or parsed.tenant or parsed.fingerprint is not None
    return Selection(parsed.session, parsed.tenant, parsed.fingerprint, not is_narrowed, parsed.api_key)


def _output(parsed: argparse.Namespace, terminal: Terminal) -> Output:
    return Output(sys.stdout, terminal, parsed.json)


def _stats(parsed: argparse.Namespace, terminal: Terminal) -> None:
    show_stats(config_of(parsed), as_json=parsed.json, out=sys.stdout)


def _verify(parsed: argparse.Namespace, terminal: Terminal) -> int:
    return verify(config_of(parsed), parsed.rate, _output(parsed, terminal))


def _rebuild(parsed: argparse.Namespace, terminal: Terminal) -> int:
    return rebuild(config_of(parsed), _output(parsed, terminal))


def _purge(parsed: argparse.Namespace, terminal: Terminal) -> int:
    return purge(config_of(parsed), _selection(parsed), _output(parsed, terminal))


def _export(parsed: argparse.Namespace, terminal: Terminal) -> int:
    return export(config_of(parsed), parsed.archive, _selection(parsed), _output(parsed, terminal))


def _import(parsed: argparse.Namespace, terminal: Terminal) -> int:
    return import_(config_of(parsed), parsed.archive, _output(parsed, terminal))
