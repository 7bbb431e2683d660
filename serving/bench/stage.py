"""The server for benches: brought up as `tokenloft serve` does it, on a Ray and in a warehouse folder of its own.

It listens on 127.0.0.1 only. What a bench reads of the engines are their own logs of steps and their counters.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import httpx
import numpy as np

from cache.hashing import TokenIds
from serving.config import Budgets, Config, load_config
from serving.engine.step_log import StepRecord
from serving.launch import find_port, signals_after_ray, stop_signals
from serving.machine import measure_for
from serving.model_files import ModelFiles
from serving.ray_session import prepare_environment, ray_session

Role = Literal["prefill", "decode"]

ONE_THREAD_EACH = ("prefill.threads=1", "decode.threads=1")
"""Settings of a server."""
VOCABULARY = range(1000, 40_000)
"""Token ids that prompts are drawn from."""


@dataclass(frozen=True)
class Server:
    """A server that is up."""

    client: httpx.Client
    model_name: str

    def complete(self, token_ids: TokenIds, max_tokens: int) -> dict[str, Any]:
        """The whole answer, greedy, of exactly `max_tokens` tokens."""
        response = self.client.post("/v1/completions", json=self._request(token_ids, max_tokens))
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    @contextmanager
    def streaming(self, token_ids: TokenIds, max_tokens: int) -> Iterator[Iterator[bytes]]:
        """The answer as it comes; leaving the block before its end cancels the request."""
        request = {**self._request(token_ids, max_tokens), "stream": True}
        with self.client.stream("POST", "/v1/completions", json=request) as response:
            response.raise_for_status()
            yield response.iter_raw()

    def _request(self, token_ids: TokenIds, max_tokens: int) -> dict[str, Any]:
        sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return {"model": self.model_name, "prompt": token_ids.tolist(), **sampling}

    def steps(self, role: Role, since: float) -> list[StepRecord]:
        """Steps of all engines of a role that ended after `since`, by the monotonic clock, in order."""
        answers = _engines(role).broadcast("steps", since).results(timeout_s=10.0)
        return sorted((step for steps in answers for step in steps), key=lambda step: step.ended_at)

    def counters(self, role: Role) -> Counter[str]:
        """The engines' counters, summed up."""
        counters: Counter[str] = Counter()
        for stats in _engines(role).broadcast("stats").results(timeout_s=10.0):
            counters.update(stats)
        return counters


def _engines(role: Role) -> Any:
    from ray import serve

    from serving.app import APP_NAME

    return serve.get_deployment_handle(role, app_name=APP_NAME)


@dataclass(frozen=True)
class Stage:
    """Ray and the warehouse: servers come up on it one after the other."""

    config: Config
    budgets: Budgets
    model: ModelFiles
    node_ids: tuple[str, ...]

    @contextmanager
    def serving(self, *overrides: str) -> Iterator[Server]:
        """A server with the stage's settings under `overrides`, each `section.key=value`."""
        from serving.app import Plan, running

        config = self._config(overrides)
        budgets = measure_for(config)
        with (
            running(Plan(config, budgets, self.model, self.node_ids), is_private=True),
            httpx.Client(base_url=config.http.url, timeout=600.0, trust_env=False) as client,
        ):
            yield Server(client, self.model.name)

    def _config(self, overrides: Sequence[str]) -> Config:
        changes = load_config(None, overrides).model_dump(exclude_unset=True)
        merged = {name: {**self.config.model_dump()[name], **section} for name, section in changes.items()}
        config = Config.model_validate({**self.config.model_dump(), **merged})
        return config.model_copy(update={"http": config.http.model_copy(update={"port": find_port(config)})})


@contextmanager
def open_stage(model: ModelFiles, progress: Callable[[str], None]) -> Iterator[Stage]:
    """Everything is stopped and removed when the block ends, however it ends."""
    with (
        TemporaryDirectory(prefix="tokenloft-handoff-") as directory,
        stop_signals(),
        redirect_stdout(sys.stderr),  # what Ray's processes print: a report may be all of standard output
    ):
        overrides = (f"cache.directory={Path(directory, 'warehouse')}", "http.port=0")
        config = load_config(None, overrides)
        budgets = measure_for(config)
        prepare_environment()
        progress("starting Ray")
        with ray_session(config, budgets):
            from serving.app import node_stores

            with signals_after_ray(), node_stores(config, budgets) as stores:
                yield Stage(config, budgets, model, tuple(stores))


def wait_until_still(server: Server, role: Role, still_s: float = 0.5, timeout_s: float = 60.0) -> None:
    """Until the engines of a role have made no step for a while. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while steps := server.steps(role, time.monotonic() - still_s):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{role} goes on and on: {steps[-1]}")
        time.sleep(still_s / 5)


def draw_prompt(num_tokens: int, seed: int) -> TokenIds:
    """Random tokens; another prompt for each seed and length."""
    rng = np.random.default_rng((abs(seed), int(seed < 0), num_tokens))
    return rng.integers(VOCABULARY.start, VOCABULARY.stop, num_tokens).astype(np.int32)
