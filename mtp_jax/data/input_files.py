"""The files of a command line: what is read of the inputs, and what is left out."""

import collections
import dataclasses
import fnmatch
import os
import pathlib
from collections.abc import Iterator
from typing import NoReturn

from mtp_jax.errors import UserError

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_LINES_SUFFIX = ".jsonl"
_ROWS_SUFFIX = ".parquet"
_KNOWN = (*_TEXT_SUFFIXES, _LINES_SUFFIX, _ROWS_SUFFIX)
_ALWAYS_EXCLUDED = ("__pycache__", ".*")
_PACKING_SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
# Never text, so not even read where an input names such a file itself.
_NO_TEXT = {
    ".arrow": "write its texts as .jsonl",
    ".zst": "unpack it, or pack it with gzip",
    ".xz": "unpack it, or pack it with gzip",
    ".bz2": "unpack it, or pack it with gzip",
    ".zip": "unpack it",
}


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file to read, and the name of its documents."""

    path: pathlib.Path
    name: str
    size: int  # bytes on disk

    @property
    def holds_lines(self) -> bool:
        """True where a line is a document: for .jsonl, and rows of .parquet as such."""
        return _suffix(self.path) in (_LINES_SUFFIX, _ROWS_SUFFIX)

    @property
    def holds_rows(self) -> bool:
        """True for .parquet."""
        return _suffix(self.path) == _ROWS_SUFFIX

    @property
    def gzipped(self) -> bool:
        """True if the name ends in .gz."""
        return self.path.name.lower().endswith(".gz")


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of the inputs."""

    files: list[InputFile]
    left_out: collections.Counter[str]  # number of files or folders by reason

    @property
    def aside(self) -> str:
        """The counts of what was left out, in brackets; empty if nothing was."""
        return f" (left out: {_listed(self.left_out)})" if self.left_out else ""

    def summary(self) -> list[str]:
        """Lines for people: numbers of files by kind, and what was left out."""
        kinds = collections.Counter(_kind(file.path) for file in self.files)
        lines = [f"read: {_listed(kinds)}"]
        if self.left_out:
            lines.append(f"left out: {_listed(self.left_out)}")
        return lines


def find_files(inputs: list[str], excluded: list[str]) -> Found:
    """Finds the files of `inputs` in the order given, those of a directory sorted.

    Links to folders are followed; every file and folder counts once, and a file that
    can be reached without following one keeps that name.

    Args:
      inputs: files, of any suffix, and directories, of which the known suffixes count.
      excluded: names or globs; a file or folder below an input that matches one is
        left out, like hidden ones and `__pycache__`.

    Raises:
      UserError: an input does not exist or is never text, a folder cannot be read, or
        there is no file in all of them.
    """
    left_out: collections.Counter[str] = collections.Counter()
    roots = [_Root(pathlib.Path(text), excluded, left_out) for text in inputs]
    own = {_real(path) for root in roots for path in root.paths}
    folders = {folder for root in roots for folder in root.folders}
    found: dict[str, InputFile] = {}  # by real path: no file counts twice
    for root in roots:
        linked = [path for path in root.linked(folders) if _real(path) not in own]
        for path in sorted([*root.paths, *linked]):
            if (real := _real(path)) not in found:
                name = path.relative_to(root.path.parent).as_posix()
                found[real] = InputFile(path, name, _size(path))
    if not found:
        there = Found([], left_out).aside
        raise UserError(
            f"there is no file to read in {', '.join(inputs)}{there}; known are "
            f"{', '.join(_KNOWN)}, also with .gz, and any text file that --input "
            "names itself."
        )
    return Found(list(found.values()), left_out)


class _Root:
    """An input, and the files in it that need no link to a folder to be reached."""

    def __init__(
        self,
        path: pathlib.Path,
        excluded: list[str],
        left_out: collections.Counter[str],
    ):
        self.path = path
        self._excluded = [*excluded, *_ALWAYS_EXCLUDED]
        self._left_out = left_out
        self._links: list[pathlib.Path] = []  # to folders, not followed yet
        self.folders: set[str] = set()  # real paths of those that were read
        try:
            is_dir, is_file = path.is_dir(), path.is_file()
        except OSError as error:
            _refuse(error)
        if is_dir:
            self.paths = list(self._walk(path, self.folders))
        elif is_file:
            _refuse_what_is_no_text(path)
            self.paths = [path]
            if _matches(path.name, excluded):
                self.paths = []
                left_out["hidden or excluded"] += 1
        elif path.exists():
            raise UserError(f"--input={path} is neither a file nor a directory.")
        else:
            raise UserError(f"--input={path} does not exist; give a file or directory.")

    def linked(self, read: set[str]) -> Iterator[pathlib.Path]:
        """Yields the files behind links to folders.

        Args:
          read: real paths of folders that were read; those read here are added.
        """
        above = [str(p) for p in pathlib.Path(_real(self.path)).parents]
        while self._links:
            link = self._links.pop(0)
            if _real(link) in above:
                self._left_out[f"link to a folder above it ({link})"] += 1
            elif _real(link) not in read:
                yield from self._walk(link, read, unless_read=True)

    def _walk(
        self, top: pathlib.Path, read: set[str], *, unless_read: bool = False
    ) -> Iterator[pathlib.Path]:
        """Yields files of known suffixes; notes links to folders, and what it leaves.

        Args:
          top: where to begin.
          read: gets the real paths of all folders.
          unless_read: leave out folders that are in `read` already.
        """
        for folder, folders, names in os.walk(top, onerror=_refuse):
            read.add(_real(folder))
            below = []
            for name in sorted(folders):
                path = pathlib.Path(folder, name)
                if _matches(name, self._excluded):
                    self._left_out["hidden or excluded"] += 1
                elif path.is_symlink():
                    self._links.append(path)
                elif not (unless_read and _real(path) in read):
                    below.append(name)
            folders[:] = below
            for name in names:
                path = pathlib.Path(folder, name)
                if (reason := self._why_not(path)) is None:
                    yield path
                else:
                    self._left_out[reason] += 1

    def _why_not(self, path: pathlib.Path) -> str | None:
        """The reason to leave a file out, if there is one."""
        if _matches(path.name, self._excluded):
            return "hidden or excluded"
        try:
            if not path.is_file():
                return "broken link" if path.is_symlink() else "no regular file"
        except OSError as error:
            _refuse(error)
        return None if _suffix(path) in _KNOWN else _kind(path)


def _refuse(error: OSError) -> NoReturn:
    """Raises UserError for a file or folder that the system does not let in."""
    name = pathlib.Path(os.fsdecode(error.filename)).name
    raise UserError(
        f"{error.filename} cannot be read ({error.strerror}); mend it, or leave it out "
        f"with --exclude={name}."
    ) from None


def _refuse_what_is_no_text(path: pathlib.Path) -> None:
    suffix = path.suffix.lower()
    if suffix in _NO_TEXT:
        raise UserError(f"--input={path}: {suffix} is not read; {_NO_TEXT[suffix]}.")


def _real(path: str | pathlib.Path) -> str:
    return os.path.realpath(path)


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        _refuse(error)


def _suffix(path: pathlib.Path) -> str:
    return pathlib.Path(path.name.lower().removesuffix(".gz")).suffix


def _kind(path: pathlib.Path) -> str:
    """The suffix of a file, with that of its packing."""
    name = pathlib.Path(path.name.lower())
    if name.suffix in _PACKING_SUFFIXES:
        return name.with_suffix("").suffix + name.suffix
    return name.suffix or "without a suffix"


def _listed(counts: collections.Counter[str]) -> str:
    """The counts as one text, the largest first."""
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {what}" for what, count in order if count)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
