"""The runs under a folder, read from their files: how far they are, how they differ."""

import collections
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mtp_jax.config import Config, as_tree, config_from_json
from mtp_jax.errors import UserError
from mtp_jax.storage import is_remote, workdir_at

_DEPTH = 4  # folders below the first in which a run is looked for
_TAIL_BYTES = 1 << 16  # of a log: more than a line


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """A run as its files tell; a figure is None where there is none yet."""

    workdir: str
    step: int  # of the last record; 0 before the first
    steps: int | None  # that the config asks for
    finished: bool
    loss: float | None  # of head 1, in nats a target, at that step
    bits_per_byte: float | None  # of the last evaluation
    updated: float | None  # Unix time of the last record or start
    config: Config | None
    wrong: str = ""  # why the config cannot be read; empty: it can


def list_runs(folder: str | os.PathLike[str]) -> list[RunSummary]:
    """Returns the runs in a folder and below it, by name; files are only read.

    Args:
      folder: here or in an object store; itself a workdir, or some levels above.

    Raises:
      UserError: there is no such folder.
    """
    top = workdir_at(os.fspath(folder))
    if not top.is_dir():
        raise UserError(f"{top} is not a folder.")
    return [_summary(workdir) for workdir in _workdirs(top, _DEPTH)]


def differences(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """The fields of each config, as `optim.peak_lr`, that are not as in most runs.

    Where as many runs have one value as another, that of the earlier run counts.
    """
    fields = [_flat(run.config) for run in runs]
    usual = {}
    for name in sorted({name for each in fields for name in each}):
        values = [each[name] for each in fields if name in each]
        usual[name] = collections.Counter(values).most_common(1)[0][0]
    return [
        {name: value for name, value in each.items() if value != usual[name]}
        for each in fields
    ]


def _workdirs(folder: epath.Path, depth: int) -> Iterator[epath.Path]:
    """Folders with a run file; nothing is looked for within them."""
    if (folder / "run.json").exists():
        yield folder
        return
    try:
        inner = sorted(folder.iterdir()) if depth else []
    except OSError:  # not ours to read
        return
    for path in inner:
        if not path.name.startswith(".") and path.is_dir():
            yield from _workdirs(path, depth - 1)


def _summary(workdir: epath.Path) -> RunSummary:
    step = _last_record(workdir / "metrics.jsonl")
    heldout = _last_record(workdir / "heldout.jsonl")
    config, wrong, run = None, "", {}
    try:
        run = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
        config = config_from_json(run["config"], "run.json")
    except UserError as error:
        wrong = str(error)
    except (OSError, ValueError, KeyError, TypeError):
        wrong = "run.json cannot be read"
    goodput = run.get("goodput") if isinstance(run, dict) else None
    goodput = goodput if isinstance(goodput, dict) else {}
    return RunSummary(
        workdir=str(workdir),
        step=step.get("step", 0),
        steps=None if config is None else config.train.steps,
        finished=bool(goodput.get("finished", False)),
        loss=step.get("loss/head_1"),
        bits_per_byte=heldout.get("bits_per_byte"),
        updated=_changed(workdir / "metrics.jsonl") or goodput.get("at"),
        config=config,
        wrong=wrong,
    )


def _last_record(path: epath.Path) -> dict[str, Any]:
    """The last whole record of a log; empty if there is none."""
    try:
        if is_remote(path):
            lines = path.read_bytes().split(b"\n")
        else:
            with open(path, "rb") as file:
                file.seek(max(os.path.getsize(path) - _TAIL_BYTES, 0))
                lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return {}


def _changed(path: epath.Path) -> float | None:
    try:
        return float(path.stat().mtime)
    except (OSError, TypeError, ValueError):
        return None


def _flat(config: Config | None) -> dict[str, Any]:
    if config is None:
        return {}
    return {
        f"{section}.{name}": value
        for section, fields in as_tree(config).items()
        for name, value in fields.items()
    }


def told_time(seconds: float | None) -> str:
    """A Unix time for people, in local time; empty if None."""
    if seconds is None:
        return ""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
