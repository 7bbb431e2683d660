"""The configuration: strictness, messages, and the budgets that follow from it."""

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving.config import (
    GIB,
    MIB,
    OBJECT_STORE_FILL,
    OBJECT_STORE_MIN_BYTES,
    Config,
    ConfigError,
    all_keys,
    is_loopback,
    load_config,
    resolve_budgets,
    warehouse_directory,
)

LOCAL_YAML = Path(__file__).parents[2] / "configs" / "local.yaml"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return path


def refused(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(LOCAL_YAML.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_that_ships_is_valid(path: Path) -> None:
    config = load_config(path)
    resolve_budgets(config, 64 * GIB, 2000 * GIB, 16)


class TestLocalYaml:
    def test_is_exactly_the_defaults(self) -> None:
        assert load_config(LOCAL_YAML) == Config() == load_config(None)

    def test_names_every_key(self) -> None:
        written = {
            f"{section}.{key}" for section, keys in yaml.safe_load(LOCAL_YAML.read_text()).items() for key in keys
        }
        assert written == set(all_keys())

    def test_explains_every_key(self) -> None:
        lines = LOCAL_YAML.read_text().splitlines()
        keys = [number for number, line in enumerate(lines) if line.startswith("  ") and line.strip()[0] != "#"]
        assert len(keys) == len(set(all_keys()))
        assert all(lines[number - 1].startswith("  # ") for number in keys)

    def test_every_key_has_a_description(self) -> None:
        for section in Config.model_fields.values():
            assert all(field.description for field in type(section.default).model_fields.values())


class TestLoading:
    def test_overrides_win_over_the_file(self, tmp_path: Path) -> None:
        path = write(tmp_path, "http: {port: 1234, max_body_bytes: 512KB}\ndecode:\n  replicas: 2\n")
        config = load_config(path, ["http.port=4321", "cache.enabled=false", "cache.dram_bytes=1.5GiB"])
        assert (config.http.port, config.http.max_body_bytes, config.decode.replicas) == (4321, 512_000, 2)
        assert config.cache.enabled is False
        assert config.cache.dram_bytes == 3 * GIB // 2

    @pytest.mark.parametrize("text", ["", "# nothing yet\n", "http:\n  # port: 1\ncache:\n"])
    def test_what_is_commented_out_is_default(self, tmp_path: Path, text: str) -> None:
        assert load_config(write(tmp_path, text)) == Config()

    def test_null_undoes_what_the_file_sets(self, tmp_path: Path) -> None:
        path = write(tmp_path, "cache: {dram_bytes: 1GB}")
        assert load_config(path, ["cache.dram_bytes=null"]).cache.dram_bytes is None

    def test_folders_are_absolute_and_keep_the_node(self) -> None:
        config = load_config(None, ["cache.directory=some/{node}", "ray.temp_dir=~/ray"])
        assert config.cache.directory == Path.cwd() / "some" / "{node}"
        assert config.ray.temp_dir == Path.home() / "ray"
        assert warehouse_directory(config) == config.cache.directory
        assert warehouse_directory(Config()).name == "warehouse"

    def test_keys_do_not_show(self) -> None:
        config = load_config(None, ["http.api_keys=[sk-secret]"])
        assert config.http.api_keys == ["sk-secret"]
        assert "sk-secret" not in repr(config)


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("decode: {replicsa: 2}", "decode.replicsa: unknown key; did you mean decode.replicas?"),
            ("decod: {replicas: 2}", "decod: unknown key; did you mean decode?"),
            ("decode: {host: 127.0.0.1}", "decode.host: unknown key; did you mean http.host?"),
            ("port: 80", "port: unknown key; did you mean http.port?"),
            ("router: {zzzz: 1}", "router.zzzz: unknown key; known here: overload_factor, prediction_ttl_s"),
            ("1: 2", "1: unknown key; known here: model, http,"),
            ("http: {port: '80'}", "http.port: should be a valid integer, not '80'"),
            ("http: {port: 65536}", "http.port: should be less than or equal to 65535, not 65536"),
            ("http: {port: true}", "http.port: should be a valid integer, not True"),
            ("cache: {enabled: 1}", "cache.enabled: should be a valid boolean, not 1"),
            ("cache: {dram_bytes: -1}", "cache.dram_bytes: should be greater than or equal to 0, not -1"),
            ("cache: {dram_bytes: 16Q}", "such as 512KB, 16MB or 4GiB, not '16Q'"),
            ("cache: {dram_bytes: -1GB}", "such as 512KB, 16MB or 4GiB, not '-1GB'"),
            ("cache: {directory: 5}", "cache.directory: should be the path of a folder, not 5"),
            ("cache: {encryption_key_file: 5}", "cache.encryption_key_file: should be the path of a file, not 5"),
            ("cache: {lease_ttl_s: .nan}", "cache.lease_ttl_s: should be a finite number"),
            ("model: {dtype: int8}", "model.dtype: should be 'auto', 'float32', 'bfloat16' or 'float16', not 'int8'"),
            ("model: {device: gpu}", "model.device: should be auto, cpu, cuda or cuda:N, not 'gpu'"),
            ("model: smollm", "model: should be a section with keys under it, not a text"),
            ("[1]", "should hold sections such as `model:`, not a list"),
            ("http: {port: 1, port: 2}", "key 'port' is given twice"),
            ("http: {port: ", "not valid YAML"),
            ("{a: 1}: 2", "not valid YAML"),
            ("http: {port: 2001-13-01}", "not valid YAML"),
            ("http: {1: 2}", "http.1: unknown key; known here: host, port"),
            (
                "cache: {kv_dtype: int4}",
                "cache.kv_dtype: should be 'auto', 'float32', 'bfloat16', 'float16', 'float8_e4m3fn' or 'int8', "
                "not 'int4'",
            ),
            ("decode: {weights: int8}", "decode.weights: should be 'float32', 'bf16' or 'int4', not 'int8'"),
            ("prefill: {weights: int4}", "prefill.weights: unknown key; did you mean decode.weights?"),
            ("http: {prt: 1}\nmodel: {dtype: 3}", "(and 1 more)"),
        ],
    )
    def test_a_file_is_refused_in_one_line(self, tmp_path: Path, text: str, said: str) -> None:
        path = write(tmp_path, text)
        message = refused(path)
        assert message.startswith(f"{path}: ")
        assert said in message

    @pytest.mark.parametrize("override", ["http.port", "http=1", "port=1", "a.b.c=1", ".port=1", "http.port=["])
    def test_a_malformed_override_is_named(self, override: str) -> None:
        assert refused(None, override).startswith(f"--set {override}: ")

    def test_the_source_of_an_error_is_named(self, tmp_path: Path) -> None:
        path = write(tmp_path, "http: {port: bad}")
        assert refused(path, "decode.replicas=2").startswith(f"{path}: http.port")
        assert refused(path, "http.port=worse").startswith("--set: http.port")
        assert refused(write(tmp_path, "http: 5"), "http.port=1").startswith("--set: http: should be a section")

    def test_files_that_can_not_be_read(self, tmp_path: Path) -> None:
        assert "there is no such config file" in refused(tmp_path / "none.yaml")
        assert "can't be read" in refused(tmp_path)
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        assert "can't be read" in refused(tmp_path / "binary")

    def test_a_refused_key_is_not_shown(self) -> None:
        assert "secret" not in refused(None, "http.api_keys=sk-secret")
        assert "secret" not in refused(None, "http.api_keys=[[sk-secret]]")

    @given(st.text(max_size=40))
    def test_any_override_is_taken_or_refused(self, text: str) -> None:
        for override in (text, f"http.host={text}", f"cache.dram_bytes={text}"):
            with contextlib.suppress(ConfigError):
                assert isinstance(load_config(None, [override]), Config)


class TestOpenAddress:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org"])
    def test_needs_keys(self, host: str) -> None:
        assert "set http.api_keys" in refused(None, f"http.host='{host}'")
        assert "set http.api_keys" not in refused(None, f"http.host='{host}'", "http.api_keys=['']")
        assert load_config(None, [f"http.host='{host}'", "http.api_keys=[sk-1]"]).http.host == host

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
    def test_loopback_does_not(self, host: str) -> None:
        assert is_loopback(host)
        assert load_config(None, [f"http.host='{host}'"]).http.host == host


class TestBudgets:
    def test_a_laptop(self) -> None:
        budgets = resolve_budgets(Config(), 20 * GIB, 100 * GIB, num_cores=8)
        assert (budgets.prefill_threads, budgets.decode_threads) == (4, 4)
        assert budgets.prefill_pool_bytes == budgets.decode_pool_bytes == 2 * GIB
        assert budgets.dram_bytes == 3 * GIB
        assert budgets.disk_bytes == 25 * GIB
        assert budgets.handoff_bytes == GIB
        assert budgets.object_store_bytes == pytest.approx(4 * GIB / OBJECT_STORE_FILL, abs=2)

    def test_a_big_machine_is_not_taken_whole(self) -> None:
        budgets = resolve_budgets(Config(), 2000 * GIB, 9000 * GIB, num_cores=128)
        assert budgets.decode_pool_bytes == 4 * GIB
        assert budgets.dram_bytes == 8 * GIB
        assert budgets.disk_bytes == 64 * GIB
        assert budgets.handoff_bytes == GIB

    def test_a_nearly_full_disk_keeps_its_reserve(self) -> None:
        assert resolve_budgets(Config(), GIB, GIB + 5, num_cores=1).disk_bytes == 5
        assert resolve_budgets(Config(), GIB, GIB - 5, num_cores=1).disk_bytes == 0

    def test_what_is_configured_stands(self) -> None:
        config = load_config(
            None,
            [
                "prefill.pool_bytes=1MB",
                "decode.pool_bytes=2MB",
                "prefill.threads=3",
                "decode.threads=5",
                "cache.dram_bytes=0",
                "cache.disk_bytes=1TB",
                "cache.handoff_bytes=7MB",
            ],
        )
        budgets = resolve_budgets(config, GIB, GIB, num_cores=1)
        assert (budgets.prefill_pool_bytes, budgets.decode_pool_bytes) == (1_000_000, 2_000_000)
        assert (budgets.prefill_threads, budgets.decode_threads) == (3, 5)
        assert (budgets.dram_bytes, budgets.disk_bytes, budgets.handoff_bytes) == (0, 10**12, 7_000_000)
        assert budgets.object_store_bytes == OBJECT_STORE_MIN_BYTES

    def test_engines_share_the_cores(self) -> None:
        config = load_config(None, ["prefill.replicas=0", "decode.replicas=3"])
        assert resolve_budgets(config, GIB, GIB, num_cores=7).decode_threads == 2
        assert resolve_budgets(config, GIB, GIB, num_cores=1).decode_threads == 1

    def test_a_cache_switched_off_takes_nothing_but_the_handoff(self) -> None:
        config = load_config(None, ["cache.enabled=false", "cache.dram_bytes=4GiB", "cache.disk_bytes=4GiB"])
        budgets = resolve_budgets(config, 8 * GIB, 8 * GIB, num_cores=2)
        assert (budgets.dram_bytes, budgets.disk_bytes) == (0, 0)
        assert budgets.handoff_bytes > 0
        assert budgets.object_store_bytes < GIB

    def test_the_dram_tier_fits_a_configured_object_store(self) -> None:
        config = load_config(None, ["ray.object_store_bytes=1GiB", "cache.handoff_bytes=100MiB"])
        budgets = resolve_budgets(config, 20 * GIB, GIB, num_cores=2)
        assert budgets.object_store_bytes == GIB
        assert budgets.dram_bytes == int(GIB * OBJECT_STORE_FILL) - 100 * MIB

    def test_tiers_that_do_not_fit_are_refused_with_what_would(self) -> None:
        overrides = ["ray.object_store_bytes=1GiB", "cache.dram_bytes=1GiB", "cache.handoff_bytes=0"]
        with pytest.raises(ConfigError, match=r"ray\.object_store_bytes: .* use at least (\d+)") as caught:
            resolve_budgets(load_config(None, overrides), 20 * GIB, GIB, num_cores=2)
        needed = str(caught.value).split("at least ")[1].split(",")[0]
        config = load_config(None, [f"ray.object_store_bytes={needed}", *overrides[1:]])
        assert resolve_budgets(config, 20 * GIB, GIB, num_cores=2).dram_bytes == GIB

    @given(memory=st.integers(0, 2**45), disk=st.integers(0, 2**50), num_cores=st.integers(1, 512))
    def test_defaults_leave_most_of_any_machine(self, memory: int, disk: int, num_cores: int) -> None:
        budgets = resolve_budgets(Config(), memory, disk, num_cores)
        pools = budgets.prefill_pool_bytes + budgets.decode_pool_bytes
        store = budgets.object_store_bytes
        assert pools + store <= max(memory // 2, memory // 5 + OBJECT_STORE_MIN_BYTES)
        assert budgets.dram_bytes + budgets.handoff_bytes <= store * OBJECT_STORE_FILL
        assert budgets.disk_bytes <= disk // 4
        assert budgets.prefill_threads + budgets.decode_threads <= max(2, num_cores)
