"""What a command says to the person who started it: steps with times, colours only on a terminal."""

import sys
import time

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
