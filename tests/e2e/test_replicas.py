"""Two decode and two prefill replicas: sessions follow their blocks, and clients do not notice one that dies."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conversations import SHORT
from tests.e2e.dialogue import Checker, Dialogue, Memory, in_rounds, play
from tests.e2e.server import ChatAnswer, Server, ServerHome, events, wait_until

pytestmark = pytest.mark.slow

NUM_TOKENS = 600


@pytest.fixture(scope="module")
def checker(plain_model_dir: Path) -> Checker:
    return Checker(plain_model_dir, max_tokens=16)


@pytest.fixture(scope="module")
def server(plain_model_dir: Path) -> Iterator[Server]:
    settings = {"decode.replicas": 2, "prefill.replicas": 2, "prefill.remote_threshold_tokens": 128}
    with ServerHome() as home, Server(home, str(plain_model_dir), settings) as server:
        yield server


def steps_by_replica(server: Server) -> list[int]:
    return [int(engine.get("steps", 0)) for engine in server.stats()["engines"]["decode"]]


def test_sessions_follow_their_blocks(server: Server, checker: Checker) -> None:
    """Without contention every later turn finds its whole history in the pool of the replica that it went to."""
    turns = play(server, checker, in_rounds([Dialogue(each) for each in SHORT[:6]]), Memory())
    later = [turn for turn in turns if turn.number > 1]
    on_device = sum(turn.decode["device_tokens"] for turn in later)
    assert on_device >= 0.9 * sum(turn.history_tokens - 1 for turn in later)


def test_load_spreads_over_the_replicas(server: Server) -> None:
    before = steps_by_replica(server)
    with ThreadPoolExecutor(6) as pool:
        for i in range(6):
            pool.submit(server.chat, [{"role": "user", "content": f"{i}: a story of its own"}], 60, use_cache=False)
    grown = [after - was for after, was in zip(steps_by_replica(server), before, strict=True)]
    assert min(grown) > 0, grown


def wait_for_replicas(server: Server) -> None:
    """Both decode replicas answer, the one that Serve had to start anew too."""

    def are_there() -> bool:
        engines = server.stats()["engines"]["decode"]
        return isinstance(engines, list) and len(engines) == 2

    wait_until(are_there, "two decode replicas answer", 120.0)


def stream_and_kill(server: Server, messages: list[dict[str, str]], num_tokens: int, **options: Any) -> ChatAnswer:
    """Stream an answer, and SIGKILL the decode replica that computes it when a third has come."""
    before = dict(zip(server.replica_pids("decode"), [0, 0], strict=False))
    body = server.body(messages, num_tokens) | {"stream": True, "stream_options": {"include_usage": True}, **options}
    text, usage, is_killed = "", None, False
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        for event in events(response):
            usage = event.get("usage") or usage
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if not is_killed and len(text) > num_tokens // 3:
                os.kill(busiest(before), signal.SIGKILL)
                is_killed = True
    assert is_killed
    assert usage is not None
    return ChatAnswer(text, "length", usage, 0.0)


def busiest(pids: dict[int, int]) -> int:
    """The process that has used the most CPU in the last moments: the one at work."""

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    first = {pid: ticks(pid) for pid in pids}
    wait_until(lambda: max(ticks(pid) - first[pid] for pid in pids) >= 5, "a replica is at work")
    return max(pids, key=lambda pid: ticks(pid) - first[pid])


def test_a_killed_decode_replica_does_not_interrupt_its_streams(
    server: Server, plain_model_dir: Path, checker: Checker
) -> None:
    messages = [{"role": "user", "content": "Tell me a long story, and don't stop."}]
    whole = Checker(plain_model_dir, NUM_TOKENS)
    answer = stream_and_kill(server, messages, NUM_TOKENS)
    whole.check(whole.render(messages), answer)
    wait_for_replicas(server)
    play(server, checker, in_rounds([Dialogue(each) for each in SHORT[:2]]), Memory())


def test_a_killed_replica_does_not_change_what_is_sampled(server: Server) -> None:
    messages = [{"role": "user", "content": "Draw at random."}]
    options = {"temperature": 1.0, "seed": 11}
    undisturbed = server.client.post("/v1/chat/completions", json=server.body(messages, NUM_TOKENS) | options)
    wait_for_replicas(server)
    answer = stream_and_kill(server, messages, NUM_TOKENS, **options)
    assert answer.text == undisturbed.json()["choices"][0]["message"]["content"]


def test_a_killed_node_store_comes_back_with_its_disk(server: Server, checker: Checker) -> None:
    wait_for_replicas(server)
    dialogues = [Dialogue(each) for each in SHORT[6:9]]
    play(server, checker, in_rounds(dialogues), Memory())
    server.settle()
    num_blocks = server.store()["num_blocks"]
    (pid,) = [pid for pid, title in server.processes().items() if title.startswith("ray::NodeStoreActor")]
    os.kill(pid, signal.SIGKILL)
    play(server, checker, in_rounds([Dialogue(each) for each in SHORT[9:11]]), Memory())
    wait_until(lambda: server.store()["state"] == "ok", "the node store is back", 60.0)
    assert server.store()["num_recovered_blocks"] >= 0.9 * num_blocks
