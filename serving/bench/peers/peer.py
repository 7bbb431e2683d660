"""Another engine in a process of its own, which answers prompts of token ids.

A process of its own for transformers too: OpenMP lets threads sleep between two products where a process has more of
them than cores, which two engines in one process have, and a single token has hundreds of products.

    this process   {"prompts": [[id, ...], ...], "max_tokens": n}   ->   its standard input
                   {"ready": true}, once; then                      <-   its standard output
                   {"times": [[seconds, ...], ...]}                      one list per prompt, one entry per token

One line each, strictly in turn: so a peer does nothing while somebody else is measured. Whatever it prints besides
goes to a log that is quoted when it fails.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cache.hashing import TokenIds
from serving.bench.turns import Timing
from serving.errors import BenchError

TRANSFORMERS = "transformers"
VLLM = "vLLM"
LLAMA = "llama.cpp"
_FOLDER = Path(__file__).parent
_LAST_WORDS = 400
"""Characters of the log that an error quotes."""


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """Where engines beyond transformers are installed; None for one that is left out."""

    vllm_python: Path | None = None
    llama_python: Path | None = None
    gguf: Path | None = None
    """The weights for llama.cpp."""


NO_PEERS = PeerOptions()


class Peer:
    """One such process. Use as a context manager."""

    def __init__(self, name: str, command: Sequence[str], *, max_prompts: int = 1) -> None:
        """Starts it and waits until it is ready. Raises BenchError if it can't be started or ends."""
        self.name = name
        self.max_prompts = max_prompts
        """How many it takes at once."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
            )
        except OSError as error:
            self._log.close()
            raise BenchError(f"{name} can't be started: {error}") from error
        try:
            self._read()
        except BenchError:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Peer {self.name} {self._process.poll() or 'running'}>"

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, prompts: Sequence[TokenIds], max_tokens: int) -> Timing:
        """Send all prompts at once and wait for all answers. Raises BenchError if the process ends before."""
        assert self._process.stdin is not None
        asked = {"prompts": [prompt.tolist() for prompt in prompts], "max_tokens": max_tokens}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None
        times = self._read()["times"]
        if [len(come) for come in times] != [max_tokens] * len(prompts):
            raise BenchError(f"{self.name} answered with {[len(come) for come in times]} tokens, not {max_tokens} each")
        return Timing(times, [])

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        return json.loads(line)

    def _failed(self) -> BenchError:
        self._process.wait()
        self._log.seek(0)
        last_words = self._log.read().decode(errors="replace").strip()[-_LAST_WORDS:]
        return BenchError(f"{self.name} has ended with status {self._process.returncode}: {last_words}")


@contextmanager
def open_peers(options: PeerOptions, model_dir: Path, num_threads: int, max_tokens: int) -> Iterator[list[Peer]]:
    """transformers and all that are installed, for prompts and answers of up to `max_tokens` together.

    Raises BenchError.
    """
    with ExitStack() as opened:
        command = [sys.executable, str(_FOLDER / "transformers_peer.py"), str(model_dir), str(num_threads)]
        peers = [opened.enter_context(Peer(TRANSFORMERS, command, max_prompts=16))]
        if options.vllm_python is not None:
            arguments = [str(_FOLDER / "vllm_peer.py"), str(model_dir), str(num_threads), str(max_tokens)]
            peers.append(opened.enter_context(Peer(VLLM, [str(options.vllm_python), *arguments], max_prompts=16)))
        if options.llama_python is not None:
            if options.gguf is None:
                raise BenchError("llama.cpp needs the weights as a GGUF file")
            arguments = [str(_FOLDER / "llama_peer.py"), str(options.gguf), str(num_threads), str(max_tokens)]
            peers.append(opened.enter_context(Peer(LLAMA, [str(options.llama_python), *arguments])))
        yield peers
