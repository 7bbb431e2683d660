"""What a command says to the person who started it: steps with times, colours only on a terminal."""

import sys
import time

from rich.console import Console


class Terminal:
    """Lines on standard error, so that standard output stays free for results."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._is_quiet = is_quiet
        self._started = time.monotonic()

    def step(self, message: str) -> None:
        """Something begins or has happened."""
        if not self._is_quiet:
            self._console.print(f"[dim]{time.monotonic() - self._started:6.1f} s[/dim]  {_plain(message)}")

    def ready(self, message: str) -> None:
        """What the person was waiting for."""
        self._console.print(f"[bold green]{_plain(message)}[/bold green]")

    def hint(self, message: str) -> None:
        """Something to copy."""
        if not self._is_quiet:
            self._console.print(f"[dim]{_plain(message)}[/dim]")

    def error(self, message: str) -> None:
        """One line before the end."""
        self._console.print(f"[bold red]error:[/bold red] {_plain(message)}")


def _plain(message: str) -> str:
    """Brackets in a message are text, not markup."""
    return message.replace("[", r"\[")
