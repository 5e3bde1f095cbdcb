"""The log of a run: files of records for tools, lines for people.

`metrics.jsonl` has one object a logged step, `heldout.jsonl` one an evaluation;
the other logs of a run (`scalar_logs`) get their numbers.
"""

import contextlib
import json
import math
import time
from typing import Any

import jax
from etils import epath

from mtp_jax.config import Config
from mtp_jax.run.scalar_logs import ScalarLog, scalar_logs
from mtp_jax.run.screen import Screen
from mtp_jax.storage import is_remote, write_atomically

_REMOTE_EVERY_S = 30.0


class RunLog:
    """The log files of a workdir; only process 0 writes."""

    def __init__(
        self, cfg: Config, workdir: epath.Path, start_step: int, screen: Screen
    ):
        """Opens them, and drops records after `start_step`: those steps come again."""
        self._active = jax.process_index() == 0
        self.screen = screen
        self._files: dict[str, Any] = {}
        self._scalar_logs: list[ScalarLog] = []
        if not self._active:
            return
        for name in ("metrics.jsonl", "heldout.jsonl"):
            _keep_until(workdir / name, start_step)
            self._files[name] = _Lines(workdir / name)
        self._scalar_logs = scalar_logs(cfg, workdir, start_step)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Appends a record to a file, and gives its numbers to the other logs."""
        if not self._active:
            return
        # JSON has no NaN: a number that is not finite is null there.
        plain = {k: None if _not_finite(v) else v for k, v in record.items()}
        self._files[name].add(json.dumps(plain, allow_nan=False) + "\n")
        group = name.removesuffix(".jsonl")
        scalars = {
            f"{group}/{key}": value
            for key, value in record.items()
            if key not in ("step", "time") and isinstance(value, (int, float))
        }
        for log in self._scalar_logs:
            log.add(record["step"], scalars)

    def sync(self) -> None:
        """Writes to the files what an object store has not got yet."""
        for lines in self._files.values():
            lines.sync()

    def say(self, line: str) -> None:
        """Prints a line for people on stdout."""
        self.screen.say(line)

    def close(self, failed: bool = False) -> None:
        """Writes what is left, and closes the files, of a run that failed or not."""
        self.screen.close()
        # All of them, also if the disk is full; the last ones first.
        with contextlib.ExitStack() as stack:
            for log in self._scalar_logs:
                stack.callback(log.close, failed)
            for file in self._files.values():
                stack.callback(file.close)


class _Lines:
    """A file that grows by lines.

    Nothing can be appended to an object of a store, and opening one for it would
    silently begin it anew: there, the file is written as a whole, now and then.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._written = time.monotonic()
        if is_remote(path):
            self._file = None
            self._text = [path.read_text()] if path.exists() else []
        else:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._text.append(line)
        if time.monotonic() - self._written > _REMOTE_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Writes what has come since the last time; a local file has it already."""
        if self._file is None:
            self._path.write_text("".join(self._text))
            self._written = time.monotonic()

    def close(self) -> None:
        if self._file is None:
            self.sync()
        else:
            self._file.close()


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _keep_until(path: epath.Path, step: int) -> None:
    """Drops the records after `step` from a file, and what is no record."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            if line and json.loads(line)["step"] <= step:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))
