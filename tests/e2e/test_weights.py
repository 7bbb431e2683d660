"""Decode with int4 weights beside a float32 prefill, then a float32 server over what the two have stored."""

from pathlib import Path

import pytest

from tests.e2e.dialogue import Checker
from tests.e2e.server import Server, ServerHome

pytestmark = pytest.mark.slow

QUESTION = {
    "role": "user",
    "content": "Say what was said before, and what is to be said now, and then say it again. " * 4,
}


def test_only_what_prefill_computed_is_stored(plain_model_dir: Path) -> None:
    checker = Checker(plain_model_dir, max_tokens=16)
    with ServerHome() as home:
        with Server(home, str(plain_model_dir), {"decode.weights": "int4"}) as server:
            first = server.chat([QUESTION], 40)
            history = [QUESTION, {"role": "assistant", "content": first.text}, QUESTION]
            second = server.chat(history, 40)
            server.settle()
            server.stop()
        num_tokens = first.num_prompt_tokens
        assert first.usage["tokenloft"]["computed"] == {"prefill": num_tokens, "decode": 0}
        assert second.cached_tokens == num_tokens, "the prompt is there, the answer is not"
        assert second.usage["tokenloft"]["computed"]["decode"] == 0

        with Server(home, str(plain_model_dir), {"prefill.replicas": 0}) as server:
            answer = server.chat([QUESTION], 16)
            assert answer.by_tier["disk"] == num_tokens - 1
            checker.check(checker.render([QUESTION]), answer)
