"""Peers are real processes here too: small ones, that answer over the same pipes as another engine would."""

import sys
from pathlib import Path

import numpy as np
import pytest

from serving.bench.peers.peer import NO_PEERS, Peer, PeerOptions, open_peers
from serving.errors import BenchError

ANSWERS = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    times = [[sum(prompt) + at for at in range(asked["max_tokens"])] for prompt in asked["prompts"]]
    print(json.dumps({"times": times}), flush=True)
"""
STARTS_NEVER = "import sys; sys.exit('no such model')"
DIES_WHEN_ASKED = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
sys.stdin.readline()
sys.exit("out of memory")
"""
ANSWERS_SHORT = ANSWERS.replace('asked["max_tokens"]', "1")
PROMPTS = [np.array([1, 2], np.int32), np.array([3, 4, 5], np.int32)]


def _command(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_times_come_back_for_every_prompt() -> None:
    with Peer("other", _command(ANSWERS)) as peer:
        assert peer.ask(PROMPTS, 2).times == [[3, 4], [12, 13]]
        assert peer.ask(PROMPTS[:1], 1).times == [[3]]


def test_a_peer_that_does_not_start_says_why() -> None:
    with pytest.raises(BenchError, match="other has ended with status 1: no such model"):
        Peer("other", _command(STARTS_NEVER))
    with pytest.raises(BenchError, match="other can't be started"):
        Peer("other", ["/no/such/python"])


def test_a_peer_that_dies_is_no_figure() -> None:
    with Peer("other", _command(DIES_WHEN_ASKED)) as peer:
        with pytest.raises(BenchError, match="out of memory"):
            peer.ask(PROMPTS, 2)
        with pytest.raises(BenchError, match="has ended"):
            peer.ask(PROMPTS, 2)


def test_fewer_tokens_than_asked_for_are_no_figure() -> None:
    with Peer("other", _command(ANSWERS_SHORT)) as peer, pytest.raises(BenchError, match=r"\[1, 1\] tokens, not 2"):
        peer.ask(PROMPTS, 2)


def test_transformers_is_always_there(tiny_model_dir: Path) -> None:
    prompts = [np.arange(10, 30, dtype=np.int32), np.arange(40, 60, dtype=np.int32)]
    with open_peers(NO_PEERS, tiny_model_dir, 1, 64) as peers:
        (peer,) = peers
        timing = peer.ask(prompts, 3)
    assert [len(times) for times in timing.times] == [3, 3]
    assert timing.times[0] == sorted(timing.times[0])
    assert timing.first_token_s > 0


def test_llama_needs_its_weights(tiny_model_dir: Path) -> None:
    options = PeerOptions(llama_python=Path(sys.executable))
    with pytest.raises(BenchError, match="GGUF"), open_peers(options, tiny_model_dir, 1, 64):
        pass


def test_an_environment_without_the_engine_says_so(tiny_model_dir: Path) -> None:
    options = PeerOptions(vllm_python=Path(sys.executable))
    with pytest.raises(BenchError, match="vLLM has ended"), open_peers(options, tiny_model_dir, 1, 64):
        pass
