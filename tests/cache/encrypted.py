"""Encrypted warehouses for tests: two keys, stores that have one or none, and folders to look into."""

import json
from pathlib import Path

from cache.client import WarehouseClient
from cache.encryption import Vault
from cache.extent import Origin
from cache.messages import PurgeQuery
from cache.node_store import NodeStore, NodeStoreConfig
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import fill, offer, query, read_and_check, store_config
from tests.cache.stores import OTHER, TOKENS, extent_files

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
ANNA = Origin("acme-label", "anna-and-her-secret-session")
BERT = Origin("bert-label", "bert")
OF_ANNA = PurgeQuery(ANNA.tenant, ANNA.session)


def vault(key: bytes = KEY) -> Vault:
    return Vault(key)


def open_with(folder: Path, key: bytes | None = KEY, config: NodeStoreConfig | None = None) -> NodeStore:
    """A store whose folder is opened with a key, or without one."""
    disk = FileTier(folder, fsync=False, lock_wait_s=0.0, vault=vault(key) if key is not None else None)
    return NodeStore(config or store_config(), MemoryTier(), disk)


def stored(folder: Path, key: bytes | None = KEY) -> Path:
    """What anna and bert have stored: eleven extents."""
    with open_with(folder, key) as store:
        for tokens, origin in ((TOKENS, ANNA), (OTHER, BERT)):
            assert WarehouseClient(store).store(offer(tokens, origin=origin), fill)
    return folder


def read(store: NodeStore, tokens: list[int], key: bytes | None = KEY) -> tuple[int, set[str]]:
    """Tokens whose KV a reader with this key read and found right, and the tiers that they came from."""
    client = WarehouseClient(store, vault=vault(key) if key is not None else None)
    found = read_and_check(client, query(tokens))
    return found.tokens, set(found.tiers)


def name_of(extent_id: str) -> str:
    return vault().name_of(extent_id)


def disk_bytes(folder: Path) -> int:
    """Of all extents' files."""
    return sum(path.stat().st_size for path in extent_files(folder))


def key_of_folder(folder: Path) -> str | None:
    return json.loads((folder / "format.json").read_bytes()).get("key")  # type: ignore[no-any-return]


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Content of all files, the database's log included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
