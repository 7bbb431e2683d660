"""What a command says to the person who started it: steps with times, colours only on a terminal."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.text import Text


class Terminal:
    """Lines on standard error, so that standard output stays free for results."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        # Brackets and colons in a message are text.
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._is_quiet = is_quiet
        self._started = time.monotonic()

    def step(self, message: str) -> None:
        """Something begins or has happened."""
        if not self._is_quiet:
            elapsed = f"{time.monotonic() - self._started:6.1f} s"
            self._console.print(Text.assemble((elapsed, "dim"), f"  {message}"))

    def ready(self, message: str) -> None:
        """What the person was waiting for."""
        self._console.print(message, style="bold green")

    def hint(self, message: str) -> None:
        """Something to copy."""
        if not self._is_quiet:
            self._console.print(message, style="dim")

    def error(self, message: str) -> None:
        """One line before the end."""
        self._console.print(Text.assemble(("error:", "bold red"), f" {message}"))


class Progress:
    """How far a long piece of work has come: nothing for the first two seconds, then a line now and then."""

    FIRST_S, INTERVAL_S = 2.0, 10.0

    def __init__(self, terminal: Terminal, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._terminal = terminal
        self._what = what
        self._clock = clock
        self._next_at = clock() + self.FIRST_S

    def __call__(self, num_done: int, num_total: int) -> None:
        """So many bytes are done, of so many."""
        now = self._clock()
        if now < self._next_at:
            return
        self._next_at = now + self.INTERVAL_S
        percent = 100 * num_done // max(1, num_total)
        self._terminal.step(f"{self._what} {num_done / 2**20:,.0f} of {num_total / 2**20:,.0f} MiB ({percent} %)")
