"""An encrypted warehouse behind the actor: each process reads the key file for itself, and Ray never sees the key."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray

from cache.actor import NodeStoreOptions, connect, find_node_store, start_node_store, stop_node_store
from cache.errors import FolderError
from cache.events import Tier
from tests.cache.chains import IMAGE_BYTES, budgets, fill, offer, query, read_and_check, store_config
from tests.cache.encrypted import KEY, OTHER_KEY, key_of_folder, vault
from tests.cache.stores import TOKENS, wait_until


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    path.chmod(0o600)
    return path


def options(tmp_path: Path, key_file: Path) -> NodeStoreOptions:
    config = store_config(budgets(dram=IMAGE_BYTES), store_wait_s=20.0)
    return NodeStoreOptions(config, tmp_path / "w", fsync=False, encryption_key_file=key_file)


def test_clients_of_all_kinds_read_what_is_encrypted(local_ray: str, tmp_path: Path, key_file: Path) -> None:
    handle = start_node_store(local_ray, options(tmp_path, key_file))
    try:
        local = connect(local_ray, is_local=True, vault=vault())
        assert local.store(offer(TOKENS), fill)
        assert ray.get(handle.flush.remote(30.0))
        for client in (local, connect(local_ray, is_local=False)):
            read = read_and_check(client, query(TOKENS))
            assert (read.tokens, Tier.DISK in read.tiers) == (len(TOKENS), True)
        assert read_and_check(connect(local_ray, is_local=True), query(TOKENS)).tokens < len(TOKENS), "without the key"
    finally:
        stop_node_store(handle)
    assert key_of_folder(tmp_path / "w") == vault().key_id
    wait_until(lambda: find_node_store(local_ray) is None, 60.0)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (KEY.hex(), 0o644, "can be used by others"),
        ("short", 0o600, "should hold 32 bytes"),
        (OTHER_KEY.hex(), 0o600, "is encrypted with another key"),
        (None, 0o600, "there is no key file"),
    ],
)
def test_what_is_wrong_with_the_key_is_said_at_the_start(
    local_ray: str, tmp_path: Path, key_file: Path, content: str | None, mode: int, said: str
) -> None:
    wait_until(lambda: find_node_store(local_ray) is None, 60.0)
    stop_node_store(start_node_store(local_ray, options(tmp_path, key_file)))
    wait_until(lambda: find_node_store(local_ray) is None, 60.0)
    key_file.unlink()
    if content is not None:
        key_file.write_text(content)
        key_file.chmod(mode)
    with pytest.raises(FolderError, match=said) as failed:
        start_node_store(local_ray, replace(options(tmp_path, key_file), lock_wait_s=10.0))
    assert KEY.hex() not in str(failed.value)
    wait_until(lambda: find_node_store(local_ray) is None, 60.0)
