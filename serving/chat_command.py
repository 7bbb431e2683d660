"""`tokenloft chat`: a conversation in the terminal that shows under each answer what it reused.

    /new          begin a new conversation
    /fork         go on from here in a second conversation, the first stays as it is
    /save FILE    write the messages as JSON; `tokenloft chat --load FILE` goes on from them
    /help, /quit

Works on a terminal, over ssh, and in a pipe: each line of standard input is a message, answers go to standard
output, and everything else goes to standard error.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from serving.errors import LaunchError
from serving.sdk import Message, Session, Tokenloft, TokenloftError
from serving.terminal import Terminal

_HELP = "/new: new conversation, /fork: second one from here, /save FILE: write it as JSON, /quit: end"


class Chat:
    """One run of the command."""

    def __init__(
        self,
        client: Tokenloft,
        terminal: Terminal,
        out: TextIO,
        messages: list[Message],
        options: Mapping[str, object] | None = None,
    ) -> None:
        """`options` go into every request: `max_tokens`, `temperature`, ..."""
        self._client = client
        self._options = dict(options or {})
        self._terminal = terminal
        self._out = out
        self._session = client.session(messages=messages)

    @property
    def session(self) -> Session:
        return self._session

    def run(self, lines: Iterable[str]) -> None:
        """Take lines until they end or `/quit`."""
        for line in lines:
            text = line.strip()
            if text == "/quit":
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._say(text)

    def _say(self, text: str) -> None:
        try:
            for piece in self._session.stream(text, **self._options):
                self._out.write(piece)
                self._out.flush()
        except TokenloftError as error:
            self._terminal.error(str(error))
            return
        except KeyboardInterrupt:
            self._terminal.hint("stopped; the turn is not kept")
            return
        finally:
            self._out.write("\n")
            self._out.flush()
        if self._session.last is not None:
            self._terminal.hint(str(self._session.last.reuse))

    def _command(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        match name:
            case "/new":
                self._session = self._client.session()
                self._terminal.hint("a new conversation")
            case "/fork":
                self._session = self._session.fork()
                self._terminal.hint(f"forked after {len(self._session.messages)} messages")
            case "/save":
                self._save(argument.strip())
            case "/help":
                self._terminal.hint(_HELP)
            case _:
                self._terminal.error(f"there is no {name}; {_HELP}")

    def _save(self, name: str) -> None:
        if not name:
            self._terminal.error("/save needs a file's name")
            return
        try:
            Path(name).expanduser().write_text(json.dumps(self._session.messages, indent=2) + "\n")
        except OSError as error:
            self._terminal.error(f"can't write {name}: {error.strerror}")
        else:
            self._terminal.hint(f"saved {len(self._session.messages)} messages to {name}")


def load_messages(path: Path | None) -> list[Message]:
    """Messages of a saved conversation. Raises LaunchError if the file holds none."""
    if path is None:
        return []
    try:
        messages = json.loads(path.read_text())
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    except OSError as error:
        raise LaunchError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(f"{path} is no conversation saved by /save: {error!r}") from error


def typed_lines(terminal: Terminal) -> Iterator[str]:
    """Lines of standard input, with a prompt and line editing where a person types them."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - its import alone gives `input` line editing and a history

    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            terminal.hint("/quit ends")
