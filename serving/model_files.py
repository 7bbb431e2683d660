"""A model folder: what must lie in it, and the identity of its weights.

The digest is over the weights' content and never over a name or a path. Reading half a gigabyte takes about a second,
so the digest is kept in a small record beside the weights, with the size, both times and the inode of each file; if any
of those differ it is computed anew. Replacing a file changes its inode, writing into it changes its ctime, which no
call can set back: the record can't outlive the weights. Never loads a weight, never imports torch.
"""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD_NAME = ".tokenloft-digest.json"
_CLOCK_TICK_S = 0.02
"""No file system's ctime is coarser than the kernel's tick, 10 ms at most."""
_MAX_TRIES = 3
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""Any one of these sets of files makes a tokenizer."""


class ModelError(Exception):
    """A model that can't be had or used. The text says what was tried and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that lies ready on this machine."""

    name: str
    """The id under which it is served."""
    directory: Path
    """Absolute; holds config.json, a tokenizer and the weights as safetensors."""
    weights_digest: str
    """64 hex digits over the weights' names and content."""


def check_folder(directory: Path) -> None:
    """Raises ModelError naming every file that is missing for a model to be loaded from `directory`."""
    missing = [] if (directory / "config.json").is_file() else ["config.json"]
    if not any(all((directory / name).is_file() for name in names) for names in _TOKENIZERS):
        missing.append("a tokenizer (tokenizer.json)")
    missing += _missing_weights(directory)
    if missing:
        raise ModelError(
            f"{directory} is no complete model folder: it lacks {', '.join(missing)}. Give a folder as made by "
            "transformers' save_pretrained(), with the weights as safetensors"
        )


def _missing_weights(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is damaged ({error!r}): fetch the model again") from error
        return sorted(name for name in names if not (directory / name).is_file())
    return [] if any(directory.glob("*.safetensors")) else ["weights (*.safetensors)"]


def weights_digest(directory: Path, records_directory: Path) -> str:
    """Digest of all `*.safetensors` in `directory`, from its record if that still holds.

    Where the folder can't be written, the record goes to `records_directory`, and where that can't be either, the
    digest is computed at each start. Raises ModelError if the weights keep changing, OSError if they can't be read.
    """
    paths = sorted(directory.glob("*.safetensors"))
    records = (directory / RECORD_NAME, records_directory / _record_name(directory))
    state = _file_state(paths)
    for record in records:
        if digest := _read_record(record, state):
            return digest
    for _ in range(_MAX_TRIES):
        # A write in the same tick as its predecessor leaves no trace in the times: let the tick pass, then read.
        time.sleep(_CLOCK_TICK_S)
        digest = _compute_digest(paths)
        before, state = state, _file_state(paths)
        if before == state:
            _write_record(records, digest, state)
            return digest
    raise ModelError(f"the weights in {directory} change while they are read: wait until they are written, then retry")


def _record_name(directory: Path) -> str:
    return hashlib.blake2b(os.fsencode(directory.resolve()), digest_size=16).hexdigest() + ".json"


def _file_state(paths: list[Path]) -> dict[str, list[int]]:
    """What of each file changes whenever its content does: size, mtime, ctime, inode."""
    stats = {path.name: path.stat() for path in paths}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in stats.items()}


def _compute_digest(paths: list[Path]) -> str:
    total = hashlib.blake2b(digest_size=32)
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "blake2b").digest()
        # Both parts have a fixed length, so that no two lists of files can be taken for each other.
        total.update(hashlib.blake2b(path.name.encode()).digest() + content)
    return total.hexdigest()


def _read_record(record: Path, state: dict[str, list[int]]) -> str | None:
    try:
        kept: Any = json.loads(record.read_text())
    except (OSError, ValueError):
        return None  # none yet, or damaged: the digest is computed
    is_current = isinstance(kept, dict) and kept.get("files") == state and isinstance(kept.get("digest"), str)
    return kept["digest"] if is_current else None


def _write_record(records: tuple[Path, Path], digest: str, state: dict[str, list[int]]) -> None:
    """Keep the digest in the first place that can be written; without one, the next start computes it again."""
    text = json.dumps({"digest": digest, "files": state})
    for record in records:
        temporary = record.with_name(f"{record.name}.{os.getpid()}")
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(record)
        except OSError:
            _remove_quietly(temporary)
        else:
            return


def _remove_quietly(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a folder that can't be written can't be cleaned either
