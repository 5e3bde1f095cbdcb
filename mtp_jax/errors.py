"""Errors of the input and of a run, told apart from bugs; and how people are told."""

import contextlib
import os
import sys
import traceback
from typing import TextIO


class UserError(Exception):
    """Bad input: what is wrong, where, and what would be right, in one line.

    The command line prints the text on stderr and exits with code 2, without a
    traceback. Every other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RunFailed(Exception):
    """A run that cannot go on, through no fault of its input or of the program.

    The command line prints the text on stderr and exits with code 1.
    """


def told_as(error: BaseException) -> tuple[int, str, str]:
    """Exit code of an error, the text to print, and a line for the other processes."""
    code = 2 if isinstance(error, UserError) else 1
    if isinstance(error, UserError | RunFailed):
        before = "mtp-jax: error: " if code == 2 else "mtp-jax: "
        return code, f"{before}{error}", str(error)
    line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return code, "".join(traceback.format_exception(error)).rstrip(), line


def say(line: str) -> None:
    """Prints a line on stdout; goes on where nobody takes it."""
    _print(line, sys.stdout)


def warn(line: str) -> None:
    """Prints a line on stderr; goes on where nobody takes it."""
    _print(line, sys.stderr)


def drop(stream: TextIO) -> None:
    """Sends what a stream still holds, and all that follows, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _print(line: str, stream: TextIO | None) -> None:
    """Prints; a terminal, pipe or disk that takes no more must not end a run."""
    if stream is None:  # closed when the program started
        return
    try:
        print(line, file=stream, flush=True)
    except OSError:
        drop(stream)
