"""Work in batches whose results stay, so that it goes on after any interruption."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from mtp_jax.errors import UserError, disk_errors_told
from mtp_jax.storage import is_remote, write_atomically

Line = dict[str, Any]


class Collected:
    """A file of results: a line of settings, then a line a result, in batches.

    Batches begin at multiples of their size, whenever the work was interrupted, so that
    every result is of the same batch as without.
    """

    def __init__(self, path: epath.Path, settings: Line):
        """Reads what is there of the same settings; what is of others is begun anew.

        Args:
          path: of the file, here or in an object store.
          settings: what results depend on, in JSON's types.
        """
        self._path = path
        self._settings = settings
        self.lines: list[Line] = []
        self.chosen: Line = {}  # what was decided once, for all of the work
        self.changed: list[str] = []  # settings that made what was there useless
        self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        parts = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            lines = [json.loads(part) for part in parts]
            before = lines[0]["settings"]
            self.chosen = lines[0]["chosen"]
        except (ValueError, LookupError, TypeError):
            self.chosen, self.changed = {}, ["a file that is no result of this program"]
            return
        if before == self._settings:
            self.lines = lines[1:]
            return
        self.chosen = {}
        names = dict.fromkeys([*before, *self._settings])
        self.changed = [x for x in names if before.get(x) != self._settings.get(x)]

    def finish(
        self,
        total: int,
        size: int,
        work: Callable[[int, int], list[Line]],
        progress: Callable[[int, int], None],
    ) -> list[Line]:
        """Does what is missing; returns all results.

        Args:
          total: how many results there are in the end.
          size: of a batch.
          work: from a range of numbers to their results, in JSON's types.
          progress: is told how many there are, and of how many.

        Raises:
          UserError: another process works on the same file; or the disk is full.
        """
        if len(self.lines) < total:
            del self.lines[len(self.lines) // size * size :]
        with disk_errors_told(self._path), self._locked():
            self._rewrite()
            progress(len(self.lines), total)
            while len(self.lines) < total:
                start = len(self.lines)
                found = work(start, min(start + size, total))
                self.lines += json.loads(json.dumps(found))
                self._append(found)
                progress(len(self.lines), total)
        return self.lines

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """A context in which no other process writes the file; stores know no locks."""
        if is_remote(self._path):
            yield
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(pathlib.Path(os.fspath(self._path) + ".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self._path} is being written by another process; wait for it, "
                    "or end it."
                ) from None
            yield
            os.unlink(lock.name)

    def _rewrite(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        first = {"settings": self._settings, "chosen": self.chosen}
        write_atomically(self._path, _text([first, *self.lines]))

    def _append(self, lines: list[Line]) -> None:
        if is_remote(self._path):
            self._rewrite()
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_text(lines))

    def remove(self) -> None:
        """Removes the file, whose results are in another one now."""
        self._path.unlink(missing_ok=True)


def _text(lines: list[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
