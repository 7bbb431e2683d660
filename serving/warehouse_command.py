"""`tokenloft warehouse stats`, and how the warehouse's commands ask a running server and show what they have found."""

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache.errors import FolderError
from cache.tiers.folder import INDEX_NAME
from cache.tiers.index_db import IndexDamaged, read_fingerprints, read_totals
from serving.config import Config, warehouse_directory

TIMEOUT_S = 5.0
PURGE_TIMEOUT_S = 300.0


class ServerError(Exception):
    """A running server did not do what it was asked. The text is one line for the user."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the proxies of the environment, behind which this machine's own address is another one."""


def show_stats(config: Config, *, as_json: bool, out: TextIO) -> None:
    """Print the statistics. Raises FolderError if there is neither a folder nor a server."""
    directory = warehouse_directory(config)
    server = ask_server(config)
    folder = read_folder(directory)
    if folder is None and server is None:
        raise FolderError(f"there is no warehouse in {directory}, and no server answers at {config.http.url}")
    stats = {"folder": folder, "server": server}
    if as_json:
        write_json(stats, out)
        return
    console = Console(file=out, highlight=False)
    if folder is not None:
        fingerprints = folder.pop("fingerprints")
        _print(console, "on disk", folder)
        console.print("by fingerprint", _fingerprint_table(fingerprints), sep="\n")
    for store in (server or {}).get("stores", []):
        counters = store.pop("counters", {})
        _print(console, f"node store of {config.http.url}", {**store, **counters})
    if server is None:
        console.print(f"no server answers at {config.http.url}")


def read_folder(directory: Path) -> dict[str, Any] | None:
    """Totals of the folder's index, read beside a running owner; None if there is no index."""
    path = directory / INDEX_NAME
    if not path.exists():
        return None
    try:
        totals, fingerprints = read_totals(path), read_fingerprints(path)
    except IndexDamaged as damage:
        raise FolderError(f"the index of {directory} can't be read: {damage}") from damage
    by_fingerprint = [asdict(each) for each in fingerprints]
    return {"directory": str(directory), **asdict(totals), "fingerprints": by_fingerprint}


def ask_server(config: Config, api_key: str | None = None) -> dict[str, Any] | None:
    """The server's own statistics, None if none answers. Without a key it is asked with the config's."""
    request = urllib.request.Request(f"{config.http.url}/warehouse/stats")
    _authorize(request, api_key or key_of(config))
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
            stats: Any = json.load(answer)
            return stats if isinstance(stats, dict) else None
    except (OSError, ValueError, http.client.HTTPException):  # URLError is an OSError
        return None


def order_purge(config: Config, api_key: str | None, body: dict[str, Any]) -> dict[str, Any]:
    """Have a running server purge what belongs to a key; returns its receipt. Raises ServerError."""
    url = f"{config.http.url}/warehouse/purge"
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    _authorize(request, api_key)
    try:
        with _OPENER.open(request, timeout=PURGE_TIMEOUT_S) as answer:
            receipt: dict[str, Any] = json.load(answer)
            return receipt
    except urllib.error.HTTPError as refusal:
        with refusal:
            raise ServerError(f"the server at {config.http.url} refuses: {_reason_of(refusal)}") from refusal
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServerError(f"the server at {config.http.url} does not answer: {error}") from error


def _reason_of(refusal: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(refusal)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{refusal.code} {refusal.reason}"


def key_of(config: Config) -> str | None:
    """The key that commands send to the server."""
    return config.http.api_keys[0] if config.http.api_keys else None


def _authorize(request: urllib.request.Request, api_key: str | None) -> None:
    if api_key is not None:
        # Headers go out as Latin-1, keys as UTF-8.
        request.add_header("Authorization", f"Bearer {api_key}".encode().decode("latin-1"))


def write_json(values: dict[str, Any], out: TextIO) -> None:
    json.dump(values, out, indent=2)
    out.write("\n")


def show(title: str, values: dict[str, Any], *, as_json: bool, out: TextIO) -> None:
    """One result, as a table or as JSON."""
    if as_json:
        write_json(values, out)
    else:
        _print(Console(file=out, highlight=False), title, values)


def _print(console: Console, title: str, values: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), _human(name, value))
    console.print(Text(title), soft_wrap=True)
    console.print(table)


def _fingerprint_table(fingerprints: list[dict[str, Any]]) -> Table:
    """One line for each: models, settings and tenants that never mix."""
    table = Table("fingerprint")
    for name in ("extents", "blocks", "disk"):
        table.add_column(name, justify="right")
    for each in fingerprints:
        table.add_row(each["fingerprint"], *(_human(name, each[name]) for name in list(each)[1:]))
    return table


def _human(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,}" if isinstance(value, int) else str(value)
