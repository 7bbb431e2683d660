"""The warehouse's commands that read or change what is stored: verify, rebuild, purge, export, import.

A folder that no server uses is handled here. Where a server runs on it, `verify` and `export` read beside it, `purge`
goes through it, and the others say that it must be stopped first. Each returns the command's exit status.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from cache.encryption import Vault, open_vault
from cache.errors import ArchiveError, FolderError
from cache.hashing import BlockHash
from cache.messages import PurgeQuery
from cache.offline import owned, purge_everything, purge_folder, rebuild_index, require_warehouse, verify_folder
from cache.tiers.archive import Wanted, export_extents, import_extents
from serving.config import Config, warehouse_directory
from serving.http_settings import hash_api_key
from serving.machine import measure_for
from serving.tenants import label_of
from serving.terminal import Progress, Terminal
from serving.warehouse_command import ServerError, ask_server, key_of, order_purge, show


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go, and what is said meanwhile."""

    out: TextIO
    terminal: Terminal
    as_json: bool = False

    def show(self, title: str, values: dict[str, Any]) -> None:
        show(title, values, as_json=self.as_json, out=self.out)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which extents are meant: by exactly one of these, or everything."""

    session: str | None = None
    is_whole_tenant: bool = False
    fingerprint: BlockHash | None = None
    is_everything: bool = False
    api_key: str | None = None
    """Whose session or tenant; None: the first key of the config."""

    def key(self, config: Config) -> str | None:
        return self.api_key or key_of(config)

    def query(self, config: Config) -> PurgeQuery | None:
        """None for everything. A fingerprint is meant whoever stored it."""
        if self.is_everything:
            return None
        if self.fingerprint is not None:
            return PurgeQuery(root_hash=self.fingerprint)
        key = self.key(config)
        tenant = hash_api_key(key).hex() if key is not None else ""
        return PurgeQuery(label_of(tenant), self.session)

    def body(self) -> dict[str, Any]:
        """As a server is told."""
        if self.session is not None:
            return {"session": self.session}
        if self.fingerprint is not None:
            return {"fingerprint": self.fingerprint.hex()}
        return {"tenant": True}


def vault_of(config: Config) -> Vault | None:
    """What opens the encrypted extents of the config's warehouse. Raises KeyFileError."""
    return open_vault(config.cache.encryption_key_file)


def verify(config: Config, bytes_per_s: float, output: Output) -> int:
    """1 if something is bad."""
    directory = warehouse_directory(config)
    progress = Progress(output.terminal, "verified")
    verified = verify_folder(directory, bytes_per_s, output.terminal.step, progress, vault_of(config))
    result = asdict(verified) | {"num_bad": len(verified.bad)}
    if output.as_json:
        output.show("", result)
    else:
        for each in result.pop("bad"):
            output.terminal.error(f"extent {each['extent_id']}: {each['reason']}")
        output.show(f"verified {directory}", result)
    return 1 if verified.bad else 0


def rebuild(config: Config, output: Output) -> int:
    directory = warehouse_directory(config)
    output.show(f"new index of {directory}", asdict(rebuild_index(directory, output.terminal.step, vault_of(config))))
    return 0


def purge(config: Config, selection: Selection, output: Output) -> int:
    """1 if something is left."""
    directory, query = warehouse_directory(config), selection.query(config)
    where = str(directory)
    try:
        if query is None:
            receipt = asdict(purge_everything(directory, output.terminal.step))
        else:
            receipt = asdict(purge_folder(directory, query, output.terminal.step, vault_of(config)))
    except FolderError as error:
        # In use, or there is none: a server may have its warehouse in memory alone, or in a folder for each node.
        if not _is_of_server(config, selection.key(config)):
            raise
        if query is None:
            message = "a running server purges no more than what one key stored: stop it first, or use --tenant"
            raise ServerError(message) from error
        receipt = order_purge(config, selection.key(config), selection.body())
        where = config.http.url
    output.show(f"purged from {where}", receipt)
    return 1 if receipt.get("num_left") else 0


def _is_of_server(config: Config, api_key: str | None) -> bool:
    """A server answers, and it is the one of this config's warehouse."""
    directory = str(warehouse_directory(config))
    stores = (ask_server(config, api_key) or {}).get("stores", [])
    return any("{node}" in directory or store.get("directory") in (None, directory) for store in stores)


def export(config: Config, archive: Path, selection: Selection, output: Output) -> int:
    """1 if something was left out because it is bad."""
    directory, query = warehouse_directory(config), selection.query(config)
    require_warehouse(directory)
    is_wanted: Wanted = query.means if query is not None else lambda extent: True
    progress = Progress(output.terminal, "exported")
    exported = export_extents(directory, archive, is_wanted, progress, vault_of(config))
    output.show(f"exported to {archive}", asdict(exported))
    return 1 if exported.num_bad else 0


def import_(config: Config, archive: Path, output: Output) -> int:
    """1 if something was left out because it is bad, or for want of its key or of room."""
    directory = warehouse_directory(config)
    if "{node}" in str(directory):
        raise FolderError(f"{directory} names a folder for each node: choose one of them with --warehouse")
    if not archive.is_file():
        raise ArchiveError(f"{archive} is no file")
    budget_bytes = measure_for(config).disk_bytes
    progress = Progress(output.terminal, "imported")
    min_free_bytes, vault = config.cache.min_free_bytes, vault_of(config)
    with owned(directory, output.terminal.step, vault) as disk:
        budget_bytes -= sum(locked.image_bytes for locked in disk.recover_locked())
        imported = import_extents(archive, disk, disk.recover(), budget_bytes, min_free_bytes, progress, vault)
    output.show(f"imported into {directory}", asdict(imported))
    return 1 if imported.num_bad or imported.num_locked or imported.num_without_room else 0
