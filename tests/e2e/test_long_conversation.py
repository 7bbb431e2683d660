"""What the project is for: the next turn of a long conversation does not wait for its history to be computed again.

On the default model: a history of more than 2,000 tokens, turns that add at most 64, and the same after every process
of the system was killed. Only ratios of times are judged, taken in one run.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.model_store import ALIAS
from tests.conversations import Conversation, log_lines
from tests.e2e.dialogue import Checker, Dialogue, Memory, Turn, play
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


def test_a_long_history_is_not_computed_again(
    default_model_dir: Path, report_figure: Callable[[str], None]
) -> None:
    checker = Checker(default_model_dir, max_tokens=24)
    dialogue, memory, figures = Dialogue(Conversation("on-call", TURNS)), Memory(), Figures(report_figure)
    with ServerHome() as home:
        with Server(home, ALIAS, SETTINGS) as server:
            warm_up(server)
            # The oracle judges the last warm turn, whose KV is all turns' before it.
            cold, *warm = [ask(server, checker, dialogue, memory, verify=turn is TURNS[-1]) for turn in TURNS]
            assert cold.num_prompt_tokens >= MIN_HISTORY_TOKENS
            assert cold.reused_tokens < 64, cold
            figures.add("turn 1, cold", cold)
            for turn in warm:
                figures.add(f"turn {turn.number}", turn)
                check_reuse(turn, "device")
            time.sleep(PAUSE_BEFORE_THE_KILL_S)
            server.kill_all()
        with Server(home, ALIAS, SETTINGS) as server:
            warm_up(server)
            dialogue.conversation = Conversation("on-call", (*TURNS, TURN_AFTER_THE_KILL))
            recovered = ask(server, checker, dialogue, memory)
            figures.add("after kill -9, restarted", recovered)
            check_reuse(recovered, "disk")
            server.stop()
    report_figure(f"parity of the long conversation: {checker.oracle.parity}")
    warm_ttft_s = statistics.median(turn.answer.ttft_s for turn in warm)
    for name, ttft_s in (("warm", warm_ttft_s), ("after kill -9", recovered.answer.ttft_s)):
        ratio = ttft_s / cold.answer.ttft_s
        report_figure(f"TTFT {name} / cold: {ratio:.3f}")
        assert ratio <= MAX_TTFT_RATIO, f"TTFT {name} is {ttft_s:.2f} s, cold {cold.answer.ttft_s:.2f} s"


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
