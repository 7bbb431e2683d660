"""`ray job submit` brings the system up on a Ray that runs, and `ray job stop` ends it."""

import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import ServerHome, free_port, kill_if_there, session_processes, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SUBMIT_ATTEMPTS = 30


class RunningRay:
    """A Ray head with a dashboard, as an operator would have started it; its process session holds all of it."""

    def __init__(self, home: ServerHome) -> None:
        self._dashboard_port = free_port()
        token = home.path / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = clean | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        self._log = (home.path / "ray.log").open("wb")
        options = {
            "port": free_port(),
            "dashboard-port": self._dashboard_port,
            # Fixed by default: beside another Ray on the machine the agent could not listen, and would take no jobs.
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "temp-dir": home.ray_directory,
            "num-cpus": 2,
            "object-store-memory": 200_000_000,
        }
        self._process = self._start(options)

    def _start(self, options: Mapping[str, object]) -> subprocess.Popen[bytes]:
        command = [ray_command(), "start", "--head", "--block", *(f"--{key}={value}" for key, value in options.items())]
        return subprocess.Popen(
            command, stdout=self._log, stderr=self._log, env=self._environment, start_new_session=True
        )

    def job(self, *arguments: str) -> str:
        """Run `ray job ...` and return what it printed."""
        command = [ray_command(), "job", arguments[0], "--address", f"http://127.0.0.1:{self._dashboard_port}"]
        done = subprocess.run(
            [*command, *arguments[1:]], env=self._environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout + done.stderr

    def submit(self, entrypoint: Sequence[str]) -> str:
        """Submit a job and return its id. A Ray that has just started can't be reached, then has no agent yet."""
        for attempt in range(SUBMIT_ATTEMPTS):
            submission_id = f"tokenloft-{attempt}"
            options = ["--working-dir", ".", "--no-wait", "--submission-id", submission_id]
            said = self.job("submit", *options, "--", *entrypoint)
            if "submitted successfully" in said:
                return submission_id
            time.sleep(2.0)
        raise AssertionError(f"no agent took the job: {said}")

    def titles(self) -> list[str]:
        return list(session_processes(self._process.pid).values())

    def close(self) -> None:
        while left := session_processes(self._process.pid):
            for pid in left:
                kill_if_there(pid)
            self._process.poll()
        self._process.wait()
        self._log.close()


def ray_command() -> str:
    found = shutil.which("ray", path=sysconfig.get_path("scripts"))
    assert found is not None
    return found


@pytest.fixture
def running_ray() -> Iterator[tuple[RunningRay, ServerHome]]:
    with ServerHome() as home:
        cluster = RunningRay(home)
        try:
            yield cluster, home
        finally:
            cluster.close()


def test_a_job_serves_until_it_is_stopped(running_ray: tuple[RunningRay, ServerHome], plain_model_dir: Path) -> None:
    cluster, home = running_ray
    port = free_port()
    sizes = ["--set=cache.dram_bytes=50MB", "--set=cache.handoff_bytes=20MB", "--set=decode.pool_bytes=32MB"]
    serve = [sys.executable, "-m", "serving", "serve", "--config", "configs/local.yaml", "--port", str(port)]
    arguments = [*serve, "--model", str(plain_model_dir), "--warehouse", str(home.warehouse), *sizes]
    submission_id = cluster.submit(arguments)
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(url), "the job's server is healthy", 150.0)
    body = {"model": plain_model_dir.name, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 5}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60.0).status_code == 200

    cluster.job("stop", submission_id)
    ours = ("ray::ServeReplica:tokenloft", "ray::NodeStoreActor")
    wait_until(lambda: not [t for t in cluster.titles() if t.startswith(ours)], "what the job started has ended", 60.0)
    assert not answers(url)
    assert any("raylet" in title for title in cluster.titles()), "the Ray that it joined goes on"


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False
