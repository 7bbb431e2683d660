"""What the machine offers, and how the budgets follow it."""

from pathlib import Path

import pytest

from serving.config import GIB, MIB, ConfigError, load_config
from serving.machine import Machine, budgets_for, measure_for

LARGE = Machine(available_memory_bytes=64 * GIB, shared_memory_bytes=32 * GIB, free_disk_bytes=500 * GIB, num_cores=16)


def test_this_machine_can_be_measured_for_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    machine = Machine.measure(tmp_path / "not" / "there" / "yet")
    assert machine.available_memory_bytes > 0
    assert machine.shared_memory_bytes > 0
    assert machine.free_disk_bytes > 0
    assert machine.num_cores >= 1


def test_a_folder_below_a_file_is_measured_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert Machine.measure(tmp_path / "file" / "warehouse").free_disk_bytes > 0


def test_what_the_warehouse_holds_counts_as_free(tmp_path: Path) -> None:
    held = 512 * MIB
    extent = tmp_path / "extents" / "ab" / "cd" / "abcd.kv"
    extent.parent.mkdir(parents=True)
    with extent.open("wb") as file:
        file.truncate(held)  # sparse: takes no room, so what is free stays the same
    with_extent = Machine.measure(tmp_path).free_disk_bytes
    extent.unlink()
    without = Machine.measure(tmp_path).free_disk_bytes
    # Others write to the same disk meanwhile.
    assert abs(with_extent - without - held) < held / 2


def test_a_large_machine_gets_an_object_store_that_holds_both_budgets() -> None:
    budgets = budgets_for(load_config(None), LARGE)
    assert budgets.object_store_bytes >= (budgets.dram_bytes + budgets.handoff_bytes) / 0.7
    assert budgets.object_store_bytes <= LARGE.shared_memory_bytes


def test_little_shared_memory_makes_the_dram_tier_smaller() -> None:
    machine = Machine(64 * GIB, 2 * GIB, 500 * GIB, 16)
    budgets = budgets_for(load_config(None), machine)
    assert budgets.object_store_bytes <= 0.9 * machine.shared_memory_bytes
    assert budgets.dram_bytes + budgets.handoff_bytes <= 0.7 * budgets.object_store_bytes
    assert budgets.decode_pool_bytes == budgets_for(load_config(None), LARGE).decode_pool_bytes


def test_a_configured_object_store_is_taken_as_it_is() -> None:
    machine = Machine(64 * GIB, 1 * GIB, 500 * GIB, 16)
    config = load_config(None, ["ray.object_store_bytes=4GiB"])
    assert budgets_for(config, machine).object_store_bytes == 4 * GIB


def test_a_dram_budget_that_shared_memory_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small for the dram tier"):
        budgets_for(load_config(None, ["cache.dram_bytes=8GiB"]), Machine(64 * GIB, 2 * GIB, 500 * GIB, 16))


def test_budgets_of_this_machine(tmp_path: Path) -> None:
    budgets = measure_for(load_config(None, [f"cache.directory={tmp_path}", "cache.min_free_bytes=0"]))
    assert budgets.decode_pool_bytes > 0
    assert budgets.decode_threads >= 1
