"""A private Ray on this machine for tests: own folder, own token, nothing shared with other clusters."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]


@contextmanager
def private_ray(
    *, num_cpus: int = 2, object_store_memory: int = 100 << 20, namespace: str = "tokenloft-tests", **options: Any
) -> Iterator[str]:
    """Start Ray, yield the id of its one node, shut it down. `options` go to `ray.init`."""
    # Ray's sockets live in this folder, and their paths must stay short.
    folder = Path(tempfile.mkdtemp(prefix="tl-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    _read_environment_again()
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=num_cpus,
            object_store_memory=object_store_memory,
            namespace=namespace,
            _temp_dir=str(folder / "ray"),
            **options,
        )
        yield ray.get_runtime_context().get_node_id()
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_environment_again()
        shutil.rmtree(folder, ignore_errors=True)


def _read_environment_again() -> None:
    """Ray reads mode and token once a process; a test process starts one Ray after the other."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
