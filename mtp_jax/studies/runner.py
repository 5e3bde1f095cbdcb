"""A study run from start to end: trials that are done stay, the others are made.

A workdir holds `settings.json`, a folder a trial with its `figures.json`, and what is
made of these after every trial: `NAME.jsonl`, a line a trial, and the page `NAME.md`.
Trials depend on arm, seed and settings alone, so that it does not matter which of them
an earlier process has made, and several processes may each make some of the arms.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from mtp_jax.errors import UserError, disk_errors_told
from mtp_jax.storage import write_atomically, write_json
from mtp_jax.studies.results import page, verdicts
from mtp_jax.studies.study import Judged, Size, Study, Trial, find_study


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """Rows of a study, the page that tells them, and the verdicts on its claims."""

    rows: list[dict[str, Any]]  # as in the JSONL file
    page: str  # Markdown
    verdicts: list[Judged]


def study(
    name: str,
    workdir: str | os.PathLike[str],
    *,
    size: Size = "quick",
    seeds: int | None = None,
    steps: int | None = None,
    arms: Sequence[str] = (),
    data: Sequence[str] = (),
    report: Callable[[str], None] | None = None,
) -> StudyResult:
    """Runs the trials of a study that a workdir lacks, and judges its claims.

    Args:
      name: of the study.
      workdir: folder of its results; one of the same study and settings goes on.
      size: full is what verdicts are for; quick takes minutes, tiny seconds.
      seeds: how many, from 0 on; None for those of the study.
      steps: of training a trial, instead of those of the size.
      arms: those to run; empty for all.
      data: folders of prepared corpora, instead of the study's own.
      report: called with a line before each trial.

    Raises:
      UserError: no such study or arm, or a workdir of something else.
      RunFailed: a trial was told to stop; the same call goes on.
    """
    found = find_study(name)
    chosen = _arms(name, found, size, arms)
    folder = pathlib.Path(workdir)
    settings = {"study": name, "size": size, "steps": steps, "data": list(data)}
    with disk_errors_told(folder):
        _claim_folder(folder, settings)
        count = found.seeds(size) if seeds is None else seeds
        trials = [
            Trial(
                arm=arm,
                seed=seed,
                size=size,
                folder=folder / _folder_name(arm, seed),
                shared=folder / "data",
                steps=steps,
                data=tuple(data),
            )
            for seed in range(count)
            for arm in chosen
        ]
        for number, trial in enumerate(trials, 1):
            if (trial.folder / "figures.json").exists():
                continue
            if report is not None:
                told = f"{trial.arm}, seed {trial.seed}"
                report(f"{name}: {told} ({number} of {len(trials)})")
            _make(found, trial)
            _write(name, found, settings, folder)
        return _write(name, found, settings, folder)


def _arms(name: str, found: Study, size: Size, asked: Sequence[str]) -> Sequence[str]:
    there = dict.fromkeys([*found.arms(size), *found.arms("full"), *found.more_arms])
    for arm in asked:
        if arm not in there:
            raise UserError(
                f"{arm!r} is not an arm of {name}; there are: {'; '.join(there)}."
            )
    return list(dict.fromkeys(asked)) or found.arms(size)


def _folder_name(arm: str, seed: int) -> str:
    return f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"


def _claim_folder(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Makes the folder one of these settings, or sees that it is.

    Raises:
      UserError: it is one of other settings, or of a run.
    """
    file = folder / "settings.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={folder} is a file; give a folder.")
    if (folder / "run.json").exists():
        raise UserError(f"--workdir={folder} holds a run; give another folder.")
    if not file.exists():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        apart = [k for k in settings if there[k] != settings[k]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a study's; give another folder.") from None
    if apart:
        raise UserError(
            f"--workdir={folder} was begun with {apart[0]} {there[apart[0]]}, and this "
            f"is {settings[apart[0]]}; give another folder, or the same options."
        )


def _make(found: Study, trial: Trial) -> None:
    """Measures a trial and writes its figures."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    figures = found.measure(trial)
    made = {
        "arm": trial.arm,
        "seed": trial.seed,
        "figures": figures,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(trial.folder / "figures.json", made)


def _write(
    name: str, found: Study, settings: dict[str, Any], folder: pathlib.Path
) -> StudyResult:
    """Writes rows and page anew, of all trials that are done."""
    rows = []
    for file in folder.glob("*-seed*/figures.json"):
        try:
            made = json.loads(file.read_text(encoding="utf-8"))
            rows.append({"study": name, "size": settings["size"], **made})
        except ValueError:
            raise UserError(f"{file} is damaged; remove it.") from None
    order = {arm: i for i, arm in enumerate([*found.arms("full"), *found.more_arms])}
    rows.sort(key=lambda row: (row["seed"], order.get(row["arm"], 0), row["arm"]))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = page(name, found, rows)
    write_atomically(folder / f"{name}.jsonl", lines)
    write_atomically(folder / f"{name}.md", text)
    return StudyResult(rows, text, verdicts(found, rows))
