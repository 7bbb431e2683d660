"""Errors of commands. Each message is one line that says what is wrong and what to do."""


class LaunchError(Exception):
    """The server can't be started."""


class BenchError(Exception):
    """A bench can't be run."""
