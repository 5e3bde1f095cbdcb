"""Workdirs in a folder, or in an object store as gs://bucket/... or s3://bucket/...

Also the writing of small files there, never in part.
"""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar

from etils import epath

from mtp_jax.errors import UserError

_Path = TypeVar("_Path", epath.Path, pathlib.Path)


def workdir_at(text: str) -> epath.Path:
    """A path here or in an object store.

    Raises:
      UserError: what reaches that store is not installed, or the path looks like a
        pattern: Orbax takes it for one, and finds nothing of what it saved there.
    """
    path = epath.Path(text)
    whole = os.fspath(absolute(path))
    if found := re.search(r"[*?[]", whole):
        raise UserError(
            f"{whole} has {found[0]!r} in it, so that checkpoints there could not be "
            "read; give a path without any of * ? [, such as a link to this one."
        )
    if is_remote(path):
        try:
            path.exists()
        except ImportError as error:
            kind = "s3" if text.startswith("s3:") else "gcs"
            raise UserError(
                f"{text} cannot be reached ({error}); pip install 'mtp-jax[{kind}]'."
            ) from None
    return path


def run_at(text: str) -> tuple[epath.Path, int | None]:
    """The workdir of a run, and the step of the checkpoint if one is named in it.

    Args:
      text: the workdir, its folder `checkpoints`, or a checkpoint in that.

    Raises:
      UserError: what reaches that store is not installed.
    """
    path = workdir_at(text)
    given = absolute(path)
    if (given / "checkpoints").is_dir():
        return path, None
    if given.name == "checkpoints":
        return given.parent, None
    if given.parent.name == "checkpoints" and given.name.isdecimal():
        return given.parent.parent, int(given.name)
    return path, None


def where_runs_are(folder: epath.Path) -> str:
    """A hint for a folder that is no workdir: the layout of one, and those nearby."""
    hint = "give the workdir of a run, the folder with run.json and checkpoints/ in it"
    if not folder.is_dir():
        return f"there is no such folder; {hint}"
    below = sorted(str(path.parent) for path in folder.glob("*/checkpoints"))
    if not below:
        return hint
    return f"{hint}, like {', '.join(below[:3])}{' ...' * (len(below) > 3)}"


def is_remote(path: epath.Path | pathlib.Path) -> bool:
    """True for a path in an object store."""
    return "://" in os.fspath(path)


def absolute(path: epath.Path) -> epath.Path:
    """A local path from the root; one of an object store as it is."""
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


def make_folder(path: epath.Path | pathlib.Path, option: str) -> None:
    """Makes a folder and those above it that are not there.

    Args:
      path: of the folder.
      option: by which it was asked for, for errors, as `--output=out`.

    Raises:
      UserError: a file is in the way, or the place is none for folders, as /proc.
      OSError: what `disk_errors_told` knows.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{option}: no folder can be made there ({error.strerror}); give one in a "
            "folder that exists."
        ) from None


def write_atomically(path: epath.Path | pathlib.Path, text: str) -> None:
    """Writes a file that is either the old one or the new one, never a part."""
    if is_remote(path):  # where a write is all or nothing
        path.write_text(text)
        return
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: _Path) -> Iterator[_Path]:
    """A context with the path to write to; the file gets its name when it is whole."""
    if path.exists() and not path.is_file():  # a pipe or a device
        yield path
        return
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: epath.Path | pathlib.Path, value: Any) -> None:
    """Writes a value as an indented JSON file, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
