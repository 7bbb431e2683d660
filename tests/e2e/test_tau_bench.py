"""A longer run on recorded agent conversations, only with `--tau-bench FILE`.

The file is a JSON list of `{"id": ..., "messages": [{"role": ..., "content": ...}, ...]}` with alternating user and
assistant messages. The recorded answers are replaced by the model's own.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.model_store import ALIAS
from tests.conversations import Conversation
from tests.e2e.dialogue import Checker, Dialogue, Memory, one_by_one, play
from tests.e2e.server import Server, ServerHome

MAX_TOKENS = 32
SIZES = {
    "decode.pool_bytes": "1GB",
    "prefill.pool_bytes": "400MB",
    "cache.dram_bytes": "1GB",
    "cache.handoff_bytes": "400MB",
}
MAX_PROMPT_CHARACTERS = 9_000
"""A conversation is cut before the turn with which its user has said more: the oracle computes every prompt whole."""


def read_conversations(path: Path, num_conversations: int) -> list[Conversation]:
    """The users' side of the first conversations of the file."""
    conversations = []
    for session in json.loads(path.read_text(encoding="utf-8"))[:num_conversations]:
        turns: list[str] = []
        for text in (message["content"] for message in session["messages"] if message["role"] == "user"):
            if sum(map(len, turns)) + len(text) > MAX_PROMPT_CHARACTERS:
                break
            turns.append(text)
        conversations.append(Conversation(session["id"], tuple(turns)))
    return conversations


@pytest.mark.timeout(0)
def test_recorded_conversations(
    pytestconfig: pytest.Config, default_model_dir: Path, report_figure: Callable[[str], None]
) -> None:
    path = pytestconfig.getoption("--tau-bench")
    if path is None:
        pytest.skip("needs --tau-bench FILE")
    conversations = read_conversations(path, pytestconfig.getoption("--tau-bench-count"))
    checker = Checker(default_model_dir, MAX_TOKENS)
    with ServerHome() as home, Server(home, ALIAS, SIZES) as server:
        turns = play(server, checker, one_by_one([Dialogue(each) for each in conversations]), Memory())
        server.stop()
    report_figure(f"parity on {len(conversations)} recorded conversations: {checker.oracle.parity}")
    reused, prompt = sum(turn.reused_tokens for turn in turns), sum(turn.num_prompt_tokens for turn in turns)
    report_figure(f"reused {reused:,} of {prompt:,} prompt tokens in {len(turns)} turns")
    for turn in turns:
        assert turn.reused_tokens == turn.reusable_tokens, turn
