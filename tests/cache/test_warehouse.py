"""The warehouse's contract over every composition of tiers that runs in one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.client import WarehouseClient
from cache.events import Tier
from cache.extent import LOCKED_MAGIC
from cache.node_store import NodeStore
from cache.tiers.disk import FileTier
from cache.tiers.memory import MemoryTier
from tests.cache.chains import IMAGE_BYTES, budgets, fill, offer, query, read_and_check, store_config
from tests.cache.encrypted import vault
from tests.contracts.warehouse import TOKENS, WarehouseContract


class InProcess(WarehouseContract):
    def settle(self, client: WarehouseClient) -> None:
        assert isinstance(client.port, NodeStore)
        assert client.port.flush()
        client.port.check_integrity()


class TestDramAlone(InProcess):
    @pytest.fixture
    def client(self) -> Iterator[WarehouseClient]:
        with NodeStore(store_config(budgets(blocks=3)), MemoryTier(), None) as store:
            yield WarehouseClient(store)
            store.check_integrity()


class TestDramAndDisk(InProcess):
    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[WarehouseClient]:
        disk = FileTier(tmp_path / "warehouse", fsync=False)
        with NodeStore(store_config(budgets(blocks=3)), MemoryTier(), disk) as store:
            yield WarehouseClient(store)
            store.check_integrity()


class TestDramTooSmall(InProcess):
    """Everything but the last extents comes from disk."""

    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[WarehouseClient]:
        disk = FileTier(tmp_path / "warehouse", fsync=False)
        config = store_config(budgets(dram=2 * IMAGE_BYTES), store_wait_s=20.0)
        with NodeStore(config, MemoryTier(), disk) as store:
            yield WarehouseClient(store)
            store.check_integrity()

    def test_most_comes_from_disk(self, client: WarehouseClient) -> None:
        client.store(offer(TOKENS), fill)
        self.settle(client)
        assert read_and_check(client, query(TOKENS)).tiers.count(Tier.DISK) >= 11


class TestEncrypted(InProcess):
    """Nearly everything comes from encrypted files."""

    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[WarehouseClient]:
        disk = FileTier(tmp_path / "warehouse", fsync=False, vault=vault())
        config = store_config(budgets(dram=2 * IMAGE_BYTES), store_wait_s=20.0)
        with NodeStore(config, MemoryTier(), disk) as store:
            yield WarehouseClient(store, vault=vault())
            store.check_integrity()

    def test_most_comes_from_disk(self, client: WarehouseClient, tmp_path: Path) -> None:
        client.store(offer(TOKENS), fill)
        self.settle(client)
        assert read_and_check(client, query(TOKENS)).tiers.count(Tier.DISK) >= 11
        for path in (tmp_path / "warehouse").glob("extents/*/*/*"):
            assert path.read_bytes().startswith(LOCKED_MAGIC)


class TestAfterARestart(InProcess):
    """Everything comes from the files of a node store that was closed."""

    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[WarehouseClient]:
        with NodeStore(store_config(budgets(blocks=3)), MemoryTier(), FileTier(tmp_path / "w", fsync=False)) as store:
            yield WarehouseClient(store)

    def test_all_comes_back(self, client: WarehouseClient, tmp_path: Path) -> None:
        client.store(offer(TOKENS), fill)
        assert isinstance(client.port, NodeStore)
        client.port.close()
        with NodeStore(store_config(budgets(blocks=3)), MemoryTier(), FileTier(tmp_path / "w", fsync=False)) as store:
            assert store.stats().num_recovered_blocks == 13
            read = read_and_check(WarehouseClient(store), query(TOKENS))
            assert read.tokens == len(TOKENS)
            assert set(read.tiers) == {Tier.DISK}
            store.check_integrity()
