"""`tokenloft serve`: brings everything up in order, waits, takes everything down in the opposite order."""

import errno
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cache.messages import StoreStats
from serving.config import Budgets, Config
from serving.engine.families import check_model_type
from serving.errors import LaunchError
from serving.machine import measure_for
from serving.model_store import prepare_model
from serving.ray_session import prepare_environment, ray_address, ray_session
from serving.terminal import Terminal


def serve(config: Config, terminal: Terminal) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises LaunchError, ModelError, FolderError, ConfigError or RaySetupError, each with one clear line.
    """
    with stop_signals():
        try:
            _serve(config, terminal)
        except KeyboardInterrupt:
            terminal.step("stopped")


def _serve(config: Config, terminal: Terminal) -> None:
    started = time.monotonic()
    address = ray_address(config)
    if address is None:  # on a Ray that runs, Serve may listen there already
        config = config.model_copy(update={"http": config.http.model_copy(update={"port": find_port(config)})})
    terminal.step(f"preparing the model {config.model.name}")
    model = prepare_model(config.model.name, terminal)
    check_model_type(model_type_of(model.directory))
    budgets = measure_for(config)
    prepare_environment()
    terminal.step("starting Ray" if address is None else f"joining Ray at {address}")
    with ray_session(config, budgets) as log_directory:
        # Ray is imported only now, and with it everything that needs it.
        from serving.app import Plan, node_stores, running

        with signals_after_ray(), node_stores(config, budgets) as stores:
            for stats in stores.values():
                terminal.step(describe_store(stats))
            terminal.step(describe_engines(config, budgets))
            plan = Plan(config, budgets, model, tuple(stores))
            with running(plan, is_private=address is None):
                _announce(config, model.name, terminal, log_directory, time.monotonic() - started)
                while True:
                    signal.pause()


def model_type_of(directory: Path) -> str:
    """The family that a model folder's config names. Raises LaunchError for a config that can't be read."""
    try:
        return str(json.loads((directory / "config.json").read_bytes())["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{directory / 'config.json'} does not name a model type: {error!r}") from error


def _announce(config: Config, model: str, terminal: Terminal, log_directory: str, seconds: float) -> None:
    url = config.http.url
    terminal.ready(f"ready after {seconds:.0f} s: {url}/v1 (ctrl-C to stop; logs in {log_directory})")
    terminal.hint(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\''
    )


def describe_store(stats: StoreStats) -> str:
    """One line on a node store."""
    line = f"warehouse: {stats.dram_budget_bytes / 2**30:.1f} GiB dram"
    if stats.directory is None:
        return f"{line}, no disk tier"
    return (
        f"{line}, {stats.disk_budget_bytes / 2**30:.1f} GiB disk in {stats.directory} "
        f"({stats.num_recovered_blocks:,} blocks recovered)"
    )


def describe_engines(config: Config, budgets: Budgets) -> str:
    """One line on the engines."""
    return (
        f"loading the model into {config.prefill.replicas} prefill ({budgets.prefill_threads} threads each) "
        f"and {config.decode.replicas} decode replicas ({budgets.decode_threads} threads each)"
    )


def find_port(config: Config) -> int:
    """The configured port, or a free one for 0. Raises LaunchError if it can't be listened on."""
    host, port = config.http.host, config.http.port
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(info[0], info[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(info[4])
            return int(probe.getsockname()[1])
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a part of the name is too long
        raise LaunchError(f"http.host {host} is no address of this machine: {error}") from error
    except OSError as error:
        raise LaunchError(f"can't listen on {host} port {port}: {error.strerror}. {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.EADDRNOTAVAIL:
            return "Set http.host to an address of this machine."
        case errno.EACCES:
            return "Choose a port from 1024 on with --port."
        case _:
            return "Stop what listens there, or choose another port with --port."


@contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM ends the block as SIGINT does, with KeyboardInterrupt."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def signals_after_ray() -> Iterator[None]:
    """Ours again after `ray.init`, which installs its own; and none while things are taken down."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
