"""The command line that runs Python in a sandbox of bubblewrap's.

What a program finds there: the interpreter, its standard library and the libraries of
the system, all read-only; /dev/null and /dev/urandom. Nothing else of this machine, no
file that it could write, no network, no process but its own, and no privilege.
"""

import dataclasses
import os
import pathlib
import shutil
import stat
import sys

from mtp_jax.errors import UserError

NOBODY = 65534  # user and group; limits of processes do not bind root
_MORE = ("/usr/bin/python3", "/usr/local/bin/python3")
_SYSTEM = ("lib", "lib64", "lib32", "libx32")


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python of this machine that a user without rights can run."""

    path: str  # without links
    prefix: str  # its standard library is in lib/python3.X below


def find_bwrap() -> str | None:
    """The path of bubblewrap's program, None if it is not installed."""
    return shutil.which("bwrap")


def find_interpreter(as_nobody: bool) -> Interpreter:
    """The first Python that the sandbox can use: this one, or the system's.

    Args:
      as_nobody: it must be readable to everybody, not to this user alone.

    Raises:
      UserError: there is none.
    """
    here = os.path.realpath(sys.executable)
    for path in (here, *_MORE):
        real = os.path.realpath(path)
        prefix = str(pathlib.Path(real).parent.parent)
        if os.access(real, os.X_OK) and (not as_nobody or _open_to_all(real)):
            return Interpreter(real, prefix)
    raise UserError(
        f"no Python for the sandbox: {', '.join((here, *_MORE))} are not there, or not "
        "readable to a user without rights; install python3 of the system."
    )


def _open_to_all(path: str) -> bool:
    """True if every user may run a file: it, and all folders above."""
    places = [pathlib.Path(path), *pathlib.Path(path).parents]
    return all(place.stat().st_mode & stat.S_IXOTH for place in places)


def command(
    bwrap: str, python: Interpreter, seccomp_fd: int, as_nobody: bool
) -> list[str]:
    """The arguments before those of Python itself.

    Args:
      bwrap: path of bubblewrap.
      python: the interpreter.
      seccomp_fd: file descriptor with the filter of `seccomp.denied_calls`.
      as_nobody: change to a user without rights first, as root has to.
    """
    line = []
    if as_nobody:
        # A program of its own, since a change of user in subprocess copies the memory
        # map of this whole process first: 30 ms where a model is in it.
        setpriv = shutil.which("setpriv") or "setpriv"
        line = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    line += [bwrap, "--unshare-all", "--unshare-user", "--disable-userns"]
    line += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    line += ["--hostname", "sandbox", "--chdir", "/"]
    for name in _SYSTEM:
        for place in (f"/usr/{name}", f"/{name}"):
            if os.path.islink(place):
                line += ["--symlink", os.readlink(place), place]
            elif os.path.isdir(place):
                line += ["--ro-bind", place, place]
    line += ["--ro-bind", python.path, python.path]
    if python.prefix != "/usr":
        library = f"{python.prefix}/lib"
        line += ["--ro-bind", library, library, "--setenv", "LD_LIBRARY_PATH", library]
    for device in ("/dev/null", "/dev/urandom"):
        line += ["--dev-bind", device, device]
    line += ["--remount-ro", "/", "--seccomp", str(seccomp_fd), "--"]
    return [*line, python.path]
