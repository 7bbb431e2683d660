"""A Ray of our own, or a connection to one that runs; set up before ray is imported.

Ray reads its authentication and worker settings from the environment when it is imported, so `prepare_environment`
comes first and nothing here imports ray at the top.
"""

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs

from serving.config import Budgets, Config

NAMESPACE = "tokenloft"


class RaySetupError(Exception):
    """Ray could not be started or reached; the message says what to do."""


def prepare_environment(token_directory: Path | None = None) -> None:
    """Settings that Ray takes from the environment. What the user has set is left alone.

    Ray's own ports listen on all interfaces whatever it is told, and whoever reaches them can run code: so
    token authentication is always on, with a token file of ours, readable by the user alone, if there is none.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        directory = token_directory or Path(platformdirs.user_state_dir("tokenloft"))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(ensure_token(directory))
    # At Ray's default niceness of 15 an engine loses its core to anything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray would keep a record of every call in its GCS: 25 MiB a minute at ten turns a second.
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def ray_address(config: Config) -> str | None:
    """The Ray to join: the config's, or RAY_ADDRESS's, which is set in a Ray job. None: a private one."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or None


def ensure_token(directory: Path) -> Path:
    """The token file in `directory`, made with mode 0600 if it is missing. Raises RaySetupError."""
    path = directory / "ray_auth_token"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _make_token(path)
    except OSError as error:
        raise RaySetupError(
            f"can't keep Ray's token in {directory}: {error}. "
            "Let RAY_AUTH_TOKEN_PATH name a file that holds one, readable by you alone."
        ) from error
    return path


def _make_token(path: Path) -> None:
    """Whole or not at all; if another start is first, its token is the one."""
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")  # with mode 0600
    try:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            path.hardlink_to(temporary)
    finally:
        Path(temporary).unlink()


@contextmanager
def ray_session(config: Config, budgets: Budgets) -> Iterator[str]:
    """Connected to Ray while the block runs. Yields where Ray's logs are.

    With no address a private Ray is started and ended; another one on this machine is neither joined nor touched.
    Raises RaySetupError.
    """
    import ray

    address = ray_address(config)
    try:
        if address is None:
            context: Any = ray.init(
                address="local",
                num_cpus=max(1, len(os.sched_getaffinity(0))),
                object_store_memory=budgets.object_store_bytes,
                include_dashboard=config.ray.dashboard,
                namespace=NAMESPACE,
                log_to_driver=True,
                logging_level=logging.ERROR,
                _temp_dir=str(config.ray.temp_dir) if config.ray.temp_dir else None,
            )
        else:
            context = ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"reach Ray at {address}" if address else "start a local Ray"
        raise RaySetupError(f"could not {where}: {error}") from error
    try:
        yield str(Path(context.address_info["session_dir"], "logs"))
    finally:
        ray.shutdown()
