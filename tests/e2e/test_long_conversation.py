"""What the project is for: the next turn of a long conversation does not wait for its history to be computed again.

On the default model: a history of more than 2,000 tokens, turns that add at most 64, and the same after every process
of the system was killed; and around it the parity of some shorter conversations. Only ratios of times are judged,
taken in one run.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from serving.model_store import ALIAS
from tests.conversations import LONG, Conversation, log_lines
from tests.e2e.dialogue import Checker, Dialogue, Memory, Turn, one_by_one, play
from tests.e2e.server import Server, ServerHome

pytestmark = pytest.mark.slow

MIN_HISTORY_TOKENS = 2000
MAX_NEW_TOKENS = 64
MAX_TTFT_RATIO = 0.1
PAUSE_BEFORE_THE_KILL_S = 2.0

TURNS = (
    "You are on call. This is the log of the last hour:\n" + log_lines(84, "checkout") + "\nWhat stands out?",
    "Is it the network or the disk? One sentence.",
    "Which service do we restart first?",
    "And if that does not help?",
)
TURN_AFTER_THE_KILL = "We were cut off. Where were we?"

SETTINGS = {
    "decode.pool_bytes": "250MB",
    "prefill.pool_bytes": "150MB",
    "cache.dram_bytes": "300MB",
    "cache.handoff_bytes": "150MB",
    "cache.disk_bytes": "2GB",
}


class Figures:
    """The table that the summary shows."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        report(f"{'long conversation':24}{'prompt':>8}{'device':>8}{'dram':>8}{'disk':>8}{'computed':>10}{'TTFT':>9}")

    def add(self, name: str, turn: Turn) -> None:
        tiers = turn.answer.by_tier
        computed = turn.decode["computed_prompt_tokens"] + turn.prefill["computed_prompt_tokens"]
        self._report(
            f"{name:24}{turn.num_prompt_tokens:8}{tiers['device']:8}{tiers['dram']:8}{tiers['disk']:8}"
            f"{computed:10}{turn.answer.ttft_s:8.2f}s"
        )


def test_the_default_model_reuses_what_it_has_said(
    default_model_dir: Path, report_figure: Callable[[str], None]
) -> None:
    checker, memory, figures = Checker(default_model_dir, max_tokens=24), Memory(), Figures(report_figure)
    others = [Dialogue(each) for each in LONG]
    on_call = Dialogue(Conversation("on-call", TURNS))
    with ServerHome() as home:
        with Server(home, ALIAS, SETTINGS) as server:
            check_device_hits(play(server, checker, one_by_one(others), memory))
            # The oracle judges the last warm turn, whose KV is all turns' before it.
            cold, *warm = [ask(server, checker, on_call, memory, verify=turn is TURNS[-1]) for turn in TURNS]
            check_cold(cold)
            figures.add("turn 1, cold", cold)
            for turn in warm:
                figures.add(f"turn {turn.number}", turn)
                check_reuse(turn, "device")
            time.sleep(PAUSE_BEFORE_THE_KILL_S)
            server.kill_all()
        with Server(home, ALIAS, SETTINGS) as server:
            warm_up(server)
            recovered = ask(server, checker, prolong(on_call), memory)
            figures.add("after kill -9, restarted", recovered)
            check_reuse(recovered, "disk")
            check_disk_hits(play(server, checker, [prolong(each) for each in others], memory))
    report_figure(f"parity on the default model: {checker.oracle.parity}")
    warm_ttft_s = statistics.median(turn.answer.ttft_s for turn in warm)
    for name, ttft_s in (("warm", warm_ttft_s), ("after kill -9", recovered.answer.ttft_s)):
        ratio = ttft_s / cold.answer.ttft_s
        report_figure(f"TTFT {name} / cold: {ratio:.3f}")
        assert ratio <= MAX_TTFT_RATIO, f"TTFT {name} is {ttft_s:.2f} s, cold {cold.answer.ttft_s:.2f} s"


def prolong(dialogue: Dialogue) -> Dialogue:
    """The same dialogue with one more turn to come."""
    conversation = dialogue.conversation
    longer = replace(conversation, turns=(*conversation.turns, TURN_AFTER_THE_KILL))
    return replace(dialogue, conversation=longer)


def check_device_hits(turns: Sequence[Turn]) -> None:
    """Conversations that are told one after the other find their history in the pool."""
    assert any(turn.prefill["computed_prompt_tokens"] for turn in turns)
    for turn in turns:
        assert turn.decode["device_tokens"] == turn.reused_tokens == turn.reusable_tokens, turn
        if turn.number > 1:
            assert turn.reusable_tokens >= turn.history_tokens - 1, turn


def check_disk_hits(turns: Sequence[Turn]) -> None:
    """Conversations that go on after a restart find their history on disk."""
    for turn in turns:
        assert turn.reused_tokens == turn.reusable_tokens >= turn.history_tokens - 1, turn
        assert turn.decode["disk_tokens"] >= 0.8 * turn.reusable_tokens, turn


def check_cold(turn: Turn) -> None:
    """The first turn is long, and found nothing but what every prompt begins with."""
    assert turn.num_prompt_tokens >= MIN_HISTORY_TOKENS, turn
    assert turn.reused_tokens < 64, turn


def warm_up(server: Server) -> None:
    """A process's first steps are slow whatever they compute; they are nobody's history."""
    for _ in range(2):
        server.chat([{"role": "user", "content": "Hello!"}], 4, use_cache=False)


def ask(server: Server, checker: Checker, dialogue: Dialogue, memory: Memory, *, verify: bool = True) -> Turn:
    """The next turn, streamed; with `verify` checked against the oracle."""
    (turn,) = play(server, checker, [dialogue], memory, stream=True, verify=verify)
    return turn


def check_reuse(turn: Turn, tier: str) -> None:
    """The whole history came from `tier`, and no engine computed more than the rest."""
    history = turn.history_tokens
    assert history >= MIN_HISTORY_TOKENS, turn
    assert turn.num_prompt_tokens - history <= MAX_NEW_TOKENS, turn
    assert turn.answer.cached_tokens >= history - 1, turn
    assert turn.decode[f"{tier}_tokens"] >= history - 1, turn
    assert turn.decode["computed_prompt_tokens"] <= turn.num_prompt_tokens - (history - 1), turn
    assert not turn.prefill["computed_prompt_tokens"], turn
