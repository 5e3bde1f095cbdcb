"""Errors of the input and of a run, told apart from bugs, and their exit codes."""

import traceback


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
