"""The heart: every road that KV can take gives the oracle's tokens, and the engines' counters say that it was taken.

On a tiny model; the default model's part is in `test_long_conversation`, which has it running.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conversations import SHORT, Conversation
from tests.e2e.dialogue import Checker, Dialogue, Memory, Turn, in_rounds, one_by_one, play, total
from tests.e2e.server import Server, ServerHome

pytestmark = pytest.mark.slow

NEVER = 1_000_000
"""More uncached tokens than any prompt has: decode never asks prefill."""
TINY_POOL = {"decode.pool_bytes": "1700KB"}
"""About 2,200 tokens of the tiny model, which is two conversations."""

Report = Callable[[str], None]


@pytest.fixture(scope="module")
def checker(plain_model_dir: Path, report_figure: Report) -> Iterator[Checker]:
    checker = Checker(plain_model_dir, max_tokens=16)
    yield checker
    report_figure(f"parity on the tiny model: {checker.oracle.parity}")


def begin(conversations: Sequence[Conversation] = SHORT) -> list[Dialogue]:
    return [Dialogue(conversation) for conversation in conversations]


def assert_all_reused(turns: Sequence[Turn]) -> None:
    """Whatever could be reused was reused, and nothing but the rest was computed."""
    for turn in turns:
        assert turn.reused_tokens == turn.reusable_tokens, turn
        assert turn.decode["computed_prompt_tokens"] == turn.num_prompt_tokens - turn.reusable_tokens, turn


def test_cache_off_device_hits_and_disk_after_a_restart(plain_model_dir: Path, checker: Checker) -> None:
    memory = Memory()
    with ServerHome() as home:
        with Server(home, str(plain_model_dir), {"prefill.remote_threshold_tokens": NEVER}) as server:
            for turn in play(server, checker, one_by_one(begin()), memory, use_cache=False):
                assert turn.decode["computed_prompt_tokens"] == turn.num_prompt_tokens, turn
                assert turn.reused_tokens == 0, turn
            assert server.store()["num_blocks"] == 0

            turns = play(server, checker, one_by_one(begin()), memory)
            assert_all_reused(turns)
            for turn in turns:
                assert turn.decode["device_tokens"] == turn.reusable_tokens, turn
                if turn.number > 1:
                    assert turn.reusable_tokens >= turn.num_prompt_tokens // 3, turn
            assert not any(turn.prefill for turn in turns)
            server.settle()
            server.stop()

        # Two decode replicas, because the road from disk must not depend on whose disk it was.
        with Server(home, str(plain_model_dir), {"prefill.replicas": 0, "decode.replicas": 2}) as server:
            turns = play(server, checker, one_by_one(begin()), memory)
            assert_all_reused(turns)
            for turn in turns:
                assert turn.reusable_tokens == turn.num_prompt_tokens - 1, turn
            first = [turn for turn in turns if turn.number == 1]
            # The rest is what conversations share, and the first of them has brought to the device.
            from_disk = total(first, "disk_tokens")
            assert from_disk >= 0.6 * sum(turn.num_prompt_tokens for turn in first)

            two_decode_replicas(server, checker, memory)


def two_decode_replicas(server: Server, checker: Checker, memory: Memory) -> None:
    """Conversations that are new to a server with two decode replicas."""
    renamed = [replace(each, system=f"Second edition. {each.system or ''}") for each in SHORT]
    turns = play(server, checker, one_by_one(begin(renamed)), memory)
    assert_all_reused(turns)
    later = [turn for turn in turns if turn.number > 1]
    # A conversation's turns go where its blocks are.
    assert total(later, "device_tokens") >= 0.9 * sum(turn.reusable_tokens for turn in later)
    assert all(engine["requests"] >= len(turns) // 8 for engine in server.stats()["engines"]["decode"])


def test_split_over_prefill_and_decode_with_dram_hits(plain_model_dir: Path, checker: Checker) -> None:
    settings = {"prefill.remote_threshold_tokens": 64, "prefill.chunk_tokens": 96, **TINY_POOL}
    with ServerHome() as home, Server(home, str(plain_model_dir), settings) as server:
        for turn in play(server, checker, one_by_one(begin()), Memory(), use_cache=False):
            if turn.num_prompt_tokens >= 64:
                assert turn.prefill["computed_prompt_tokens"] == turn.num_prompt_tokens, turn
                assert turn.decode["computed_prompt_tokens"] == 0, turn
            assert turn.reused_tokens == 0, turn

        turns = play(server, checker, in_rounds(begin()), Memory(), settle=True)
        for turn in turns:
            assert turn.reused_tokens == turn.reusable_tokens, turn
            rest = turn.num_prompt_tokens - turn.reusable_tokens
            if rest >= 64:
                assert turn.decode["computed_prompt_tokens"] == 0, turn
            # Nothing twice: prefill loads what decode has, up to a fork inside a block.
            assert turn.prefill["computed_prompt_tokens"] + turn.decode["computed_prompt_tokens"] == rest, turn
        assert total(turns, "dram_tokens") >= 0.6 * sum(turn.reusable_tokens for turn in turns)


def test_disk_hits(plain_model_dir: Path, checker: Checker) -> None:
    settings = {
        "prefill.replicas": 0,
        "cache.dram_bytes": "1MB",
        "cache.extent_max_bytes": "200KB",
        "cache.fsync": "never",
        **TINY_POOL,
    }
    with ServerHome() as home, Server(home, str(plain_model_dir), settings) as server:
        turns = play(server, checker, in_rounds(begin()), Memory(), settle=True)
        assert_all_reused(turns)
        assert total(turns, "disk_tokens") >= 0.6 * sum(turn.reusable_tokens for turn in turns)
