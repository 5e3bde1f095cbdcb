"""Logs of a run as columns of numbers.

Axes: R records of a log.
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mtp_jax.storage import is_remote

try:  # five times as fast: a log may have a million lines
    from orjson import loads as _fast_loads
except ImportError:
    _fast_loads = json.loads

_CHUNK = 20_000  # records that are in memory as such at once
_TEXTS = ("batch_hash", "prompt", "sample")


@dataclasses.dataclass(frozen=True)
class Log:
    """The records of a log, by step; NaN where a record has no number."""

    step: np.ndarray  # float64 [R], increasing
    columns: dict[str, np.ndarray]  # float64 [R], by their names in the records
    unread: int = 0  # lines that are no records

    def column(self, name: str) -> np.ndarray:
        """The numbers of a name, NaN where there is none."""
        found = self.columns.get(name)
        return np.full(len(self.step), np.nan) if found is None else found

    def heads_of(self, name: str) -> list[int]:
        """The heads of which there are numbers, as in `loss/head_2`."""
        start = f"{name}/head_"
        ends = [x.removeprefix(start) for x in self.columns if x.startswith(start)]
        return sorted(int(end) for end in ends if end.isdecimal())


def records_of(path: epath.Path) -> Iterator[dict[str, Any] | None]:
    """Yields the records of a log; None for a line that is none.

    A last line without an end is still being written, and left out.

    Raises:
      OSError: the file cannot be read.
    """
    with io.BytesIO(path.read_bytes()) if is_remote(path) else open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n") and not line.isspace():
                yield _record(line)


def read_log(path: epath.Path) -> Log:
    """Reads a log of a run; empty if it is not there.

    A record of a step that another one follows of the same or an earlier step was made
    again: the later one counts.

    Raises:
      OSError: it cannot be read.
    """
    if not path.exists():
        return Log(np.zeros(0), {})
    unread, parts = 0, []
    records = records_of(path)
    while chunk := list(itertools.islice(records, _CHUNK)):
        rows = [row for row in chunk if row is not None and _is_number(row.get("step"))]
        unread += len(chunk) - len(rows)
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        parts.append(
            {name: _numbers(rows, name) for name in names if name not in _TEXTS}
            | {"": np.zeros(len(rows))}
        )
    lengths = [len(part[""]) for part in parts]
    names = dict.fromkeys(itertools.chain.from_iterable(parts))
    columns = {
        name: np.concatenate(
            [part.get(name, np.full(n, np.nan)) for part, n in zip(parts, lengths,
                                                                  strict=True)]
        )
        for name in names
        if name
    }  # fmt: skip
    if not sum(lengths):
        return Log(np.zeros(0), {}, unread)
    step = columns.pop("step")
    # A record counts unless a later one is of no later step.
    later = np.minimum.accumulate(np.append(step[1:], np.inf)[::-1])[::-1]
    kept = step < later
    columns = {name: column[kept] for name, column in columns.items()}
    return Log(step[kept], columns, unread)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = _fast_loads(line)
    except ValueError:
        try:  # which reads NaN and lone surrogates, too
            found = json.loads(line)
        except (ValueError, RecursionError):
            return None
    except RecursionError:
        return None
    return found if isinstance(found, dict) else None


def _numbers(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    values: list[Any] = [row.get(name) for row in rows]
    if not any(isinstance(value, str) for value in values[:1]):
        try:
            return np.array(values, np.float64)
        except (ValueError, TypeError, OverflowError):
            pass
    return np.array([float(v) if _is_number(v) else np.nan for v in values])


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300
