"""Errors of the input and of a run, told apart from bugs; and how people are told."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from typing import TextIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST = 1600  # characters of a line for people
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_PLACE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


class UserError(Exception):
    """Bad input: what is wrong, where, and what would be right, in one line.

    The command line prints the text on stderr and exits with code 2, without a
    traceback. Every other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        line = " ".join(message.split())
        if len(line) > _LONGEST:  # a value of a whole file, say
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class RunFailed(Exception):
    """A run that cannot go on, through no fault of its input or of the program.

    The command line prints the text on stderr and exits with code 1.
    """


def told_as(error: BaseException) -> tuple[int, str, str]:
    """Exit code of an error, the text to print, and a line for the other processes."""
    error = as_known(error) or error
    code = 2 if isinstance(error, UserError) else 1
    if isinstance(error, UserError | RunFailed):
        before = "mtp-jax: error: " if code == 2 else "mtp-jax: "
        return code, f"{before}{error}", str(error)
    line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return code, "".join(traceback.format_exception(error)).rstrip(), line


def as_known(error: BaseException) -> UserError | RunFailed | None:
    """An error of Python or JAX that is no bug as one of ours; None for others."""
    text = " ".join(str(error).split())
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    lacks = "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    if isinstance(error, MemoryError) or (of_jax and lacks):
        reason = text[:200] or type(error).__name__
        return RunFailed(
            f"out of memory ({reason}); make the model or its batches smaller"
        )
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize back"):
        return UserError(f"JAX finds no device: {text}")
    if isinstance(error, ValueError) and _raised_in(error) == "jax._src.config":
        return UserError(f"JAX refuses an environment variable JAX_...: {text}.")
    return None


def _raised_in(error: BaseException) -> str:
    """The name of the module that raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


@contextlib.contextmanager
def disk_errors_told(what: str | os.PathLike[str]) -> Iterator[None]:
    """A context that turns errors of disks, paths and limits into UserErrors.

    Args:
      what: is named where the error itself names no file.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or os.fspath(what)
        if error.errno in NO_ROOM:
            text = f"{where}: {error.strerror}; free space and run the same command"
            raise UserError(f"{text} again.") from error
        if error.errno in _TOO_MANY:
            text = f"{where}: {error.strerror}; raise the limit (ulimit -n) and run"
            raise UserError(f"{text} the same command again.") from error
        if error.errno in _NOT_ALLOWED + _NO_PLACE:
            raise UserError(f"{where}: {error.strerror}.") from error
        raise


def say(line: str) -> None:
    """Prints a line on stdout; goes on where nobody takes it."""
    _print(line, sys.stdout)


def warn(line: str) -> None:
    """Prints a line on stderr; goes on where nobody takes it."""
    _print(line, sys.stderr)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: 1 pass, 2,000 passes."""
    plural = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def on_terminal(stream: TextIO | None) -> bool:
    """True for a terminal; a stream that was closed at the start is None."""
    return stream is not None and stream.isatty()


def settle() -> None:
    """Drops what stdout and stderr cannot get rid of; Python would try at its end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except OSError:
                _drop(stream)


def _drop(stream: TextIO) -> None:
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
        _drop(stream)
