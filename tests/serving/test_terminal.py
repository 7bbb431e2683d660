"""Lines for a person: on standard error, brackets and all."""

import pytest

from serving.terminal import Progress, Terminal

CURL = """curl http://127.0.0.1:8000/v1 -d '{"messages": [{"role": "user"}]}' [bold] [/] \\"""


def test_a_message_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    for say in (terminal.step, terminal.ready, terminal.hint, terminal.error):
        say(CURL)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 4, "a long line is not wrapped"
    assert all(line.endswith(CURL) for line in lines)
    assert lines[3].startswith("error: ")
    assert "\x1b" not in err, "no colours outside of a terminal"


def test_a_quiet_one_says_only_what_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(is_quiet=True)
    terminal.step("step")
    terminal.hint("hint")
    terminal.ready("ready")
    terminal.error("broken")
    assert capsys.readouterr().err == "ready\nerror: broken\n"


def test_progress_is_told_only_where_somebody_waits(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = Progress(Terminal(), "verified", lambda: now)
    for now in range(31):
        progress(now << 20, 30 << 20)
    lines = [line.split("s  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"verified {at} of 30 MiB ({100 * at // 30} %)" for at in (2, 12, 22)]
