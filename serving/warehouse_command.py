"""`tokenloft warehouse stats`: what the folder holds, and what a running server says of its node stores."""

import http.client
import json
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from cache.errors import FolderError
from cache.tiers.folder import INDEX_NAME
from cache.tiers.index_db import IndexDamaged, read_totals
from serving.config import Config, warehouse_directory

TIMEOUT_S = 5.0

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
        json.dump(stats, out, indent=2)
        out.write("\n")
        return
    console = Console(file=out, highlight=False)
    if folder is not None:
        console.print(_table("on disk", folder))
    for store in (server or {}).get("stores", []):
        counters = store.pop("counters", {})
        console.print(_table(f"node store of {config.http.url}", {**store, **counters}))
    if server is None:
        console.print(f"no server answers at {config.http.url}")


def read_folder(directory: Path) -> dict[str, Any] | None:
    """Totals of the folder's index, read beside a running owner; None if there is no index."""
    path = directory / INDEX_NAME
    if not path.exists():
        return None
    try:
        totals = read_totals(path)
    except IndexDamaged as damage:
        raise FolderError(f"the index of {directory} can't be read: {damage}") from damage
    return {"directory": str(directory), **asdict(totals)}


def ask_server(config: Config) -> dict[str, Any] | None:
    """The server's own statistics, None if none answers."""
    request = urllib.request.Request(f"{config.http.url}/warehouse/stats")
    if config.http.api_keys:
        request.add_header("Authorization", f"Bearer {config.http.api_keys[0]}")
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
            stats: Any = json.load(answer)
            return stats if isinstance(stats, dict) else None
    except (OSError, ValueError, http.client.HTTPException):  # URLError is an OSError
        return None


def _table(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), _human(name, value))
    return table


def _human(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,}" if isinstance(value, int) else str(value)
