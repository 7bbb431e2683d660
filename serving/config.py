"""The configuration: what can be set, how a file and `--set` options become it, and the budgets that follow.

Strict: an unknown key, a wrong type or a value out of range is refused with one line that names the file, the key,
what is wrong and what is right. Null means "choose from the machine"; `resolve_budgets` does the choosing and is pure.
Never reads environment variables and never touches Ray, torch or the network.
"""

import difflib
import ipaddress
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import platformdirs
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cache.eviction import PolicyName

KIB, MIB, GIB = 2**10, 2**20, 2**30
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


class ConfigError(Exception):
    """A configuration that can't be used. Its text is one line for the user."""


def parse_bytes(value: object) -> object:
    """`16MB`, `4 GiB` or `1.5GiB` as a number of bytes; anything but a string is left to the type check."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError("should be a number of bytes, or a size such as 512KB, 16MB or 4GiB")
    return int(float(match[1]) * unit)


def _absolute(value: object) -> object:
    """Absolute at once: actors run in other working directories."""
    if not isinstance(value, str | Path):
        raise ValueError("should be the path of a folder")
    return Path(os.path.expanduser(value)).absolute()  # noqa: PTH111 - Path's own raises on ~nobody


def _absolute_file(value: object) -> object:
    if not isinstance(value, str | Path):
        raise ValueError("should be the path of a file")
    return _absolute(value)


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("should be auto, cpu, cuda or cuda:N")
    return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as open."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Folder = Annotated[Path, BeforeValidator(_absolute)]
File = Annotated[Path, BeforeValidator(_absolute_file)]


class Section(BaseModel):
    """What all sections share: unknown keys are refused, types are not bent, values do not change."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class ModelConfig(Section):
    """Which model is served."""

    name: str = Field(
        default="smollm2-135m-instruct", min_length=1, description="Local folder, hub id or built-in name"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of weights and KV; auto is float32 on a CPU and bfloat16 on a CUDA device"
    )
    device: Annotated[str, AfterValidator(_check_device)] = Field(default="auto", description="auto is CUDA if there")
    max_model_len: int | None = Field(default=None, ge=2, description="Most tokens in all; null: the model's own")


class HttpConfig(Section):
    """The HTTP edge."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address; others than loopback need api_keys")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on")
    api_keys: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], repr=False, description="Accepted bearer keys; none: everyone who reaches the port"
    )
    share_cache_between_keys: bool = Field(default=False, description="true: one key finds what another one stored")
    max_body_bytes: Bytes = Field(default=16 * MIB, gt=0, description="Largest request body")
    max_requests: int = Field(default=256, ge=1, description="Requests for completions in progress; more get a 429")

    @property
    def url(self) -> str:
        """Where clients on this machine reach the server."""
        host = f"[{self.host}]" if ":" in self.host.strip("[]") and not self.host.startswith("[") else self.host
        return f"http://{host}:{self.port}"

    @model_validator(mode="after")
    def _guard_open_address(self) -> Self:
        if not self.api_keys and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines: set http.api_keys, or use 127.0.0.1"
            )
        return self


class PrefillConfig(Section):
    """The prefill deployment."""

    replicas: int = Field(default=1, ge=0, description="Number of replicas; 0: decode computes every prompt")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray sets aside for each; 0.5: two on one")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each; null: a share, and idle cores")
    chunk_tokens: int = Field(default=256, ge=1, description="Tokens computed in one step and handed off together")
    pool_bytes: Bytes | None = Field(default=None, gt=0, description="KV pool of each; null: a share of memory")
    remote_threshold_tokens: int = Field(
        default=256, ge=1, description="Uncached prompt tokens from which decode asks a prefill replica"
    )
    accept_timeout_s: float = Field(default=5.0, gt=0, description="Wait for a replica, then decode computes alone")
    progress_timeout_s: float = Field(default=60.0, gt=0, description="Wait for a chunk, then decode goes on alone")


class DecodeConfig(Section):
    """The decode deployment."""

    replicas: int = Field(default=1, ge=1, description="Number of replicas")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray sets aside for each; 0.5: two on one")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each; null: a share, and idle cores")
    chunk_tokens: int = Field(default=256, ge=1, description="Most tokens computed in one step")
    max_running: int = Field(default=16, ge=1, description="Most sequences decoded together by one replica")
    max_ongoing_requests: int = Field(default=256, ge=1, description="Most requests of one replica, waiting or not")
    pool_bytes: Bytes | None = Field(default=None, gt=0, description="KV pool of each; null: a share of memory")
    weights: Literal["float32", "bf16", "int4"] = Field(
        default="float32", description="How decode keeps weights; smaller ones are faster and change answers a little"
    )


class CacheConfig(Section):
    """The warehouse of KV blocks."""

    enabled: bool = Field(default=True, description="false: no lookup, nothing kept")
    directory: Folder | None = Field(default=None, description="Disk tier; null: in the user's cache folder")
    block_size: int = Field(default=32, ge=1, le=1024, description="Tokens in a block")
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn", "int8"] = Field(
        default="auto", description="Of stored KV; auto keeps every bit, smaller ones change answers a little"
    )
    extent_max_bytes: Bytes = Field(default=16_000_000, gt=0, description="Most payload of one extent")
    dram_bytes: Bytes | None = Field(default=None, description="Budget of the dram tier; null: a share of memory")
    disk_bytes: Bytes | None = Field(default=None, description="Budget of the disk tier; null: a share of the disk")
    min_free_bytes: Bytes = Field(default=GIB, description="Disk space always left free")
    handoff_bytes: Bytes | None = Field(default=None, description="KV between prefill and decode; null: automatic")
    eviction: PolicyName = Field(default="reuse", description="Which extents leave a full tier")
    fsync: Literal["always", "batched", "never"] = Field(default="batched", description="What a power cut may lose")
    fsync_interval_s: float = Field(default=0.05, gt=0, le=60, description="Longest wait of a batch")
    dirty_bytes: Bytes | None = Field(default=None, description="Most that waits to be written; null: half of dram")
    lease_ttl_s: float = Field(default=60.0, gt=0, description="A claim on an extent ends after this")
    encryption_key_file: File | None = Field(default=None, description="Key of the disk tier; null: not encrypted")
    scrub_bytes_per_s: Bytes = Field(default=4_000_000, description="Stored files are checked at this rate; 0: never")


class RouterConfig(Section):
    """How a decode replica is chosen."""

    overload_factor: float = Field(default=2.0, ge=1, description="Load, against the least, that loses sessions")
    prediction_ttl_s: float = Field(default=5.0, ge=0, description="How long blocks of a routed request count as there")


class RayConfig(Section):
    """The Ray that carries it all."""

    address: str | None = Field(default=None, min_length=1, description="null: a private Ray; auto or host:port: join")
    temp_dir: Folder | None = Field(default=None, description="Ray's sockets and logs; null: Ray's default")
    dashboard: bool = Field(default=False, description="Ray's dashboard, which `ray job submit` needs")
    object_store_bytes: Bytes | None = Field(default=None, gt=0, description="null: what the tiers need")


class Config(Section):
    """All that can be configured. `configs/local.yaml` explains each key."""

    model: ModelConfig = ModelConfig()
    http: HttpConfig = HttpConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    cache: CacheConfig = CacheConfig()
    router: RouterConfig = RouterConfig()
    ray: RayConfig = RayConfig()


def warehouse_directory(config: Config) -> Path:
    """Folder of the disk tier: the configured one, or `warehouse` in the user's cache folder."""
    return config.cache.directory or Path(platformdirs.user_cache_dir("tokenloft"), "warehouse")


# --- Loading ---------------------------------------------------------------------------------------------------------


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, under the YAML file `path`, under `overrides` of the form `section.key=value` (value in YAML).

    Raises ConfigError with one line for the first thing that is wrong.
    """
    data = _read_file(path) if path else {}
    changed = [_apply_override(data, override) for override in overrides]
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, changed)) from error


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings name each key once; plain YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a thirteenth month, for example
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    data = _parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: should hold sections such as `model:`, not {_kind(data)}")
    # A section whose keys are all commented out reads as null.
    return {key: {} if value is None and key in Config.model_fields else value for key, value in data.items()}


def _apply_override(data: dict[str, Any], override: str) -> str:
    """Put `section.key=value` into `data`; returns the dotted key."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or len(keys) != 2 or not all(keys):
        raise ConfigError(f"--set {override}: should be section.key=value, for example http.port=8001")
    value = _parse_yaml(text, f"--set {override}")
    section = data.setdefault(keys[0], {})
    if isinstance(section, dict):  # otherwise the file is wrong, and validation will say so
        section[keys[1]] = value
    return ".".join(keys)


def _explain(error: ValidationError, path: Path | None, changed: Sequence[str]) -> str:
    """One line for the first of the errors: source, key, what is wrong, what is right."""
    details = error.errors(include_url=False)
    first = details[0]
    dotted = _dotted(first["loc"])
    # An error of a whole section is blamed on its changed keys, if there are any.
    is_changed = any(key == dotted or key.startswith(f"{dotted}.") for key in changed)
    source = "--set" if is_changed or path is None else str(path)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{source}: {dotted}: {_complaint(first)}{more}"


def _dotted(loc: tuple[int | str, ...]) -> str:
    """`("http", "api_keys", 0)` as `http.api_keys`."""
    return ".".join(str(part) for part in loc[:2])


def _complaint(detail: ErrorDetails) -> str:
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        return f"unknown key{_suggestion(detail['loc'])}"
    if detail["type"] == "model_type":
        return f"should be a section with keys under it, not {_kind(detail['input'])}"
    if detail["type"] == "value_error":
        text = str(detail["ctx"]["error"])
        return text if isinstance(detail["input"], Mapping) else f"{text}, not {detail['input']!r}"
    # Pydantic's sentences begin with "Input should be"; the value itself is left out where it may be a secret.
    text = detail["msg"].removeprefix("Input ")
    text = text[:1].lower() + text[1:]
    return text if "api_keys" in detail["loc"] else f"{text}, not {detail['input']!r}"


def _suggestion(loc: tuple[int | str, ...]) -> str:
    key = str(loc[-1])
    siblings = list(Config.model_fields) if len(loc) == 1 else _keys_of(str(loc[0]))
    if close := difflib.get_close_matches(key, siblings, n=1):
        return f"; did you mean {'.'.join([*map(str, loc[:-1]), close[0]])}?"
    if elsewhere := [dotted for dotted in all_keys() if dotted.endswith(f".{key}")]:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; known here: {', '.join(siblings)}"


def _keys_of(section: str) -> list[str]:
    default: Section = Config.model_fields[section].default
    return list(type(default).model_fields)


def all_keys() -> Iterator[str]:
    """Every key that can be set, as `section.key`."""
    return (f"{section}.{key}" for section in Config.model_fields for key in _keys_of(section))


def _kind(value: object) -> str:
    return {"list": "a list", "str": "a text", "NoneType": "nothing"}.get(type(value).__name__, repr(value))


# --- Budgets ---------------------------------------------------------------------------------------------------------

OBJECT_STORE_MIN_BYTES = 100 * MIB
"""Ray refuses an object store under about 79 MB."""
OBJECT_STORE_FILL = 0.7
"""Share of the object store that we fill: above it, fragmentation and late frees make Ray spill."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Concrete sizes for one node: what the config says, or what the machine allows."""

    prefill_pool_bytes: int
    """KV pool of each prefill engine."""
    decode_pool_bytes: int
    """KV pool of each decode engine."""
    prefill_threads: int
    decode_threads: int
    dram_bytes: int
    disk_bytes: int
    handoff_bytes: int
    object_store_bytes: int


def resolve_budgets(config: Config, available_memory_bytes: int, free_disk_bytes: int, num_cores: int) -> Budgets:
    """Fill in what the config leaves open. All engines are taken to run on this one node.

    `free_disk_bytes` counts what the warehouse already holds as free; otherwise its budget would shrink with each
    restart. Raises ConfigError if a configured object store can't hold the configured tiers.
    """
    memory, cache = available_memory_bytes, config.cache
    threads = max(1, num_cores // (config.prefill.replicas + config.decode.replicas))
    pool_bytes = min(memory // 10, 4 * GIB)
    handoff_bytes = _or_default(cache.handoff_bytes, min(memory // 20, GIB))
    dram_bytes, object_store_bytes = _dram_and_object_store(config, handoff_bytes, min(memory * 15 // 100, 8 * GIB))
    spare_disk_bytes = max(0, free_disk_bytes - cache.min_free_bytes)
    disk_bytes = _or_default(cache.disk_bytes, min(free_disk_bytes // 4, 64 * GIB, spare_disk_bytes))
    return Budgets(
        prefill_pool_bytes=_or_default(config.prefill.pool_bytes, pool_bytes),
        decode_pool_bytes=_or_default(config.decode.pool_bytes, pool_bytes),
        prefill_threads=_or_default(config.prefill.threads, threads),
        decode_threads=_or_default(config.decode.threads, threads),
        dram_bytes=dram_bytes,
        disk_bytes=disk_bytes if cache.enabled else 0,
        handoff_bytes=handoff_bytes,
        object_store_bytes=object_store_bytes,
    )


def _dram_and_object_store(config: Config, handoff_bytes: int, dram_default_bytes: int) -> tuple[int, int]:
    """The dram tier and the object store that holds it: the default of either fits what is set of the other."""
    set_store_bytes, set_dram_bytes = config.ray.object_store_bytes, config.cache.dram_bytes
    if not config.cache.enabled:
        set_dram_bytes = 0
    if set_store_bytes is None:
        dram_bytes = _or_default(set_dram_bytes, dram_default_bytes)
        return dram_bytes, max(OBJECT_STORE_MIN_BYTES, _object_store_for(dram_bytes + handoff_bytes))
    room_bytes = int(set_store_bytes * OBJECT_STORE_FILL) - handoff_bytes
    dram_bytes = _or_default(set_dram_bytes, max(0, min(dram_default_bytes, room_bytes)))
    if dram_bytes > room_bytes:
        needed = max(OBJECT_STORE_MIN_BYTES, _object_store_for(dram_bytes + handoff_bytes))
        raise ConfigError(
            f"ray.object_store_bytes: {set_store_bytes} is too small for the dram tier ({dram_bytes}) and the handoff "
            f"({handoff_bytes}): use at least {needed}, or lower cache.dram_bytes and cache.handoff_bytes"
        )
    return dram_bytes, set_store_bytes


def _object_store_for(held_bytes: int) -> int:
    return int(held_bytes / OBJECT_STORE_FILL) + 1


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value
