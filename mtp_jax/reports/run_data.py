"""The content of a run's files, as its report shows it."""

import calendar
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from mtp_jax.config import Config, as_tree, config_from_json
from mtp_jax.errors import UserError, counted
from mtp_jax.run.history import changes_of_starts, read_history
from mtp_jax.run.log_columns import Log, read_log, records_of
from mtp_jax.storage import absolute, run_at, where_runs_are


@dataclasses.dataclass(frozen=True)
class Start:
    """A time that the run was started, as `run.json` has it."""

    after: int  # steps done before
    at: float | None  # Unix time
    devices: int | None
    processes: int | None
    changes: list[str]  # settings that were others before, with what that does


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text that the model wrote while it was trained."""

    step: int
    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class RunData:
    """Everything in the files of a run that its report shows."""

    workdir: epath.Path
    name: str  # short, and of no other run of the report
    config: Config | None
    metrics: Log  # at least one record
    heldout: Log
    starts: list[Start]
    samples: list[Sample]
    goodput: dict[str, float]  # seconds by kind; empty if they are not known
    finished: bool
    facts: list[tuple[str, str]]  # versions, devices, command
    evaluations: list[tuple[str, dict[str, Any]]]  # file, content of eval*.json
    tasks: list[tuple[str, dict[str, Any]]]  # name, content of eval/NAME.json
    notes: list[str]  # what was left out, and why

    @property
    def heads(self) -> int:
        """The number of heads, by the config or by the log."""
        if self.config is not None:
            return self.config.model.n_future_tokens
        return max(self.metrics.heads_of("loss"), default=1)


def read_runs(workdirs: Sequence[str | os.PathLike[str]]) -> list[RunData]:
    """Reads the files of runs; a file that cannot be read is left out with a note.

    Raises:
      UserError: none is given, one is given twice, or one has no records of steps.
    """
    folders = [run_at(os.fspath(workdir))[0] for workdir in workdirs]
    whole = [os.fspath(absolute(folder)) for folder in folders]
    if not whole:
        raise UserError("give the workdir of a run.")
    for name, other in zip(whole, workdirs, strict=True):
        if whole.count(name) > 1:
            raise UserError(f"--workdir={os.fspath(other)} is given twice.")
    return [
        _read(folder, name) for folder, name in zip(folders, _names(whole), strict=True)
    ]


def config_differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Fields of the configs that are not the same in all runs, with their values."""
    trees = [_flat(run.config) for run in runs]
    fields = dict.fromkeys(field for tree in trees for field in tree)
    rows = [(field, [tree.get(field, "") for tree in trees]) for field in fields]
    return [(field, values) for field, values in rows if len(set(values)) > 1]


def config_rows(config: Config) -> list[tuple[str, str, bool]]:
    """(field, value, whether it is the default) of every field of a config."""
    usual = _flat(Config())
    rows = _flat(config).items()
    return [(field, value, usual.get(field) == value) for field, value in rows]


def _flat(config: Config | None) -> dict[str, str]:
    if config is None:
        return {}
    return {
        f"{section}.{name}": _told(value)
        for section, fields in as_tree(config).items()
        for name, value in fields.items()
    }


def _told(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def _names(whole: list[str]) -> list[str]:
    """The shortest ends of different paths that are different."""
    parts = [path.strip("/").split("/") for path in whole]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return [name or "/" for name in names]
    return whole


def _read(folder: epath.Path, name: str) -> RunData:
    notes: list[str] = []
    metrics = _log(folder, "metrics.jsonl", notes)
    if not len(metrics.step):
        raise UserError(
            f"{folder} holds no metrics.jsonl with a record of a step, so there is "
            f"nothing to report; {where_runs_are(folder)}."
        )
    run = read_history(folder)
    if not run:
        notes.append("run.json is not there or cannot be read: no config, no starts")
    config = None
    if run:
        try:
            config = config_from_json(run.get("config"), "run.json")  # type: ignore[arg-type]
        except UserError as error:
            notes.append(f"no config: {error}")
    goodput = run.get("goodput")
    goodput = goodput if isinstance(goodput, dict) else {}
    seconds = goodput.get("seconds")
    return RunData(
        workdir=folder,
        name=name,
        config=config,
        metrics=metrics,
        heldout=_log(folder, "heldout.jsonl", notes),
        starts=_starts(run, notes),
        samples=_samples(folder / "heldout.jsonl"),
        goodput=_seconds(seconds) if isinstance(seconds, dict) else {},
        finished=goodput.get("finished") is True,
        facts=_facts(run),
        evaluations=_results(folder, "eval*.json", ("heads", "bits_per_byte"), notes),
        tasks=_results(folder / "eval", "*.json", ("task", "metrics", "items"), notes),
        notes=notes,
    )


def _log(folder: epath.Path, name: str, notes: list[str]) -> Log:
    try:
        log = read_log(folder / name)
    except OSError as error:
        raise UserError(f"{folder / name} cannot be read: {error.strerror}.") from None
    if log.unread:
        are = "is no record" if log.unread == 1 else "are no records"
        notes.append(f"{counted(log.unread, 'line')} of {name} {are}, and left out")
    return log


def _samples(path: epath.Path) -> list[Sample]:
    found = []
    for row in records_of(path) if path.exists() else ():
        row = row or {}
        step, prompt, text = row.get("step"), row.get("prompt"), row.get("sample")
        if isinstance(step, int) and isinstance(prompt, str) and isinstance(text, str):
            found.append(Sample(step, prompt, text))
    return found


def _starts(run: dict[str, Any], notes: list[str]) -> list[Start]:
    try:
        changes = changes_of_starts(run)
        return [
            Start(
                int(start.get("after", 0)),
                _unix(start.get("time")),
                start.get("devices"),
                start.get("processes"),
                changed,
            )
            for start, changed in zip(run.get("runs", []), changes, strict=True)
        ]
    except (TypeError, ValueError, AttributeError, LookupError):
        notes.append("the starts in run.json cannot be read")
        return []


def _unix(text: Any) -> float | None:
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except (TypeError, ValueError, OverflowError):
        return None


def _seconds(seconds: dict[str, Any]) -> dict[str, float]:
    return {
        kind: float(value)
        for kind, value in seconds.items()
        if isinstance(value, (int, float)) and value >= 0
    }


def _facts(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines on what the run ran on."""
    facts = []
    device = run.get("device")
    if isinstance(device, dict):
        facts.append(("devices", f"{device.get('count')} x {device.get('kind')}"))
        facts.append(("processes", str(device.get("processes"))))
    for title, key in (("mesh", "mesh"), ("versions", "versions")):
        if isinstance(found := run.get(key), dict):
            facts.append((title, ", ".join(f"{k} {v}" for k, v in found.items())))
    tokenizer = run.get("tokenizer")
    if isinstance(tokenizer, dict):
        facts.append(("tokenizer", str(tokenizer.get("kind"))))
    if isinstance(command := run.get("command"), list):
        facts.append(("last command", " ".join(map(str, command))))
    return facts


def _results(
    folder: epath.Path, pattern: str, needed: tuple[str, ...], notes: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Files of figures by their names; others of the pattern are noted."""
    found = []
    for path in sorted(folder.glob(pattern)) if folder.is_dir() else []:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not set(needed) <= content.keys():
                raise ValueError
        except (OSError, ValueError, RecursionError):
            notes.append(f"{path.name} is no file of figures, and left out")
            continue
        found.append((path.stem, content))
    return found
