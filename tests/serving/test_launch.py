"""Starting: the port, what is said, what a signal does."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.messages import StoreStats
from serving.config import GIB, Config, load_config
from serving.errors import LaunchError
from serving.launch import describe_engines, describe_store, find_port, model_type_of, signals_after_ray, stop_signals
from serving.machine import Machine, budgets_for


def config_of(host: str, port: int) -> Config:
    return load_config(None, [f'http.host="{host}"', f"http.port={port}"])


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_a_free_port_is_found_for_0() -> None:
    port = find_port(config_of("127.0.0.1", 0))
    assert port > 0
    assert find_port(config_of("127.0.0.1", port)) == port, "it was not kept"


def test_a_port_in_use_is_refused_with_what_to_do(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(LaunchError, match=rf"127\.0\.0\.1 port {port}.*in use.*another port with --port"):
        find_port(config_of("127.0.0.1", port))


def test_a_port_whose_last_connection_is_fresh_can_be_taken_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            pass
    assert find_port(config_of("127.0.0.1", port)) == port


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 80])
def test_a_host_that_is_no_address_is_named(host: str) -> None:
    config = load_config(None, [f"http.host={host}", "http.api_keys=[key]"])
    with pytest.raises(LaunchError, match=rf"http\.host {host} is no address"):
        find_port(config)


def test_an_address_of_another_machine_is_refused() -> None:
    config = load_config(None, ["http.host=192.0.2.1", "http.api_keys=[key]"])
    with pytest.raises(LaunchError, match=r"192\.0\.2\.1.*Set http\.host to an address of this machine"):
        find_port(config)


def stats(directory: str | None) -> StoreStats:
    return StoreStats("node", directory, "ok", 3, 1200, 0, 2 * GIB, 0, 30 * GIB, 0, GIB, 0, 1200)


def test_a_store_is_told_in_one_line() -> None:
    line = describe_store(stats("/somewhere/warehouse"))
    assert line == "warehouse: 2.0 GiB dram, 30.0 GiB disk in /somewhere/warehouse (1,200 blocks recovered)"
    assert describe_store(stats(None)) == "warehouse: 2.0 GiB dram, no disk tier"


def test_engines_are_told_in_one_line() -> None:
    config = load_config(None, ["decode.replicas=2", "prefill.threads=3"])
    budgets = budgets_for(config, Machine(64 * GIB, 32 * GIB, 500 * GIB, 9))
    line = describe_engines(config, budgets)
    assert "1 prefill (3 threads each)" in line
    assert "2 decode replicas (3 threads each)" in line


def test_the_model_type_is_read_from_the_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert model_type_of(tiny_model_dir) == "llama"
    with pytest.raises(LaunchError, match=r"config\.json"):
        model_type_of(tmp_path)
    for text in ("{", "{}", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(LaunchError, match="does not name a model type"):
            model_type_of(tmp_path)


def test_sigterm_ends_the_block_and_is_what_it_was_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_are_taken_back_from_ray_and_left_out_while_things_are_taken_down() -> None:
    with stop_signals():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init does, in its own way
        with pytest.raises(KeyboardInterrupt), signals_after_ray():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
