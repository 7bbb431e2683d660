"""What this machine has to offer, measured once at start."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from cache.tiers.folder import extent_files
from serving.config import Budgets, Config, resolve_budgets, warehouse_directory

SHARED_MEMORY = Path("/dev/shm")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes and cores that are free for us."""

    available_memory_bytes: int
    shared_memory_bytes: int
    free_disk_bytes: int
    """On the warehouse's file system, what the warehouse already holds counted as free."""
    num_cores: int

    @classmethod
    def measure(cls, warehouse: Path) -> "Machine":
        memory = psutil.virtual_memory()
        limit = _cgroup_limit_bytes()
        available = memory.available if limit is None else min(memory.available, limit)
        shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else available
        disk = shutil.disk_usage(_existing_parent(warehouse)).free + _held_bytes(warehouse)
        return cls(available, shared, disk, len(os.sched_getaffinity(0)))


def budgets_for(config: Config, machine: Machine) -> Budgets:
    """The config's sizes, with the open ones fitted to the machine. Raises ConfigError if they contradict."""
    budgets = resolve_budgets(config, machine.available_memory_bytes, machine.free_disk_bytes, machine.num_cores)
    room = int(machine.shared_memory_bytes * 0.9)
    if config.ray.object_store_bytes is None and budgets.object_store_bytes > room:
        # A container's shared memory may be tiny; a larger store would silently lie on disk.
        ray = config.ray.model_copy(update={"object_store_bytes": room})
        fitted = config.model_copy(update={"ray": ray})
        return resolve_budgets(fitted, machine.available_memory_bytes, machine.free_disk_bytes, machine.num_cores)
    return budgets


def measure_for(config: Config) -> Budgets:
    """`budgets_for` on this machine as it is now."""
    return budgets_for(config, Machine.measure(warehouse_directory(config)))


def _cgroup_limit_bytes() -> int | None:
    for path in _CGROUP_LIMITS:
        try:
            return int(path.read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if _is_dir(parent))


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:  # inside a folder that is closed to us; whoever opens the warehouse says so
        return False


def _held_bytes(warehouse: Path) -> int:
    return sum(path.stat().st_size for path in extent_files(warehouse))
