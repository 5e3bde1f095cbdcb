"""A task with its data, read and checked, and the settings of its measurement."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.eval.tasks.kinds import (
    AnswerTask,
    CodeTask,
    Task,
)
from mtp_jax.eval.tasks.rows import example_of, find_data, read_rows

_USUAL_K = (1, 10, 100)  # those of the papers
_WARM = 0.8
_NUMBER = "__row__"  # a column for the number of a row in its file


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings of a measurement; None is for what the task or the others decide."""

    limit: int | None = None  # only the first so many examples
    samples: int = 1  # texts that the model writes for each
    k: tuple[int, ...] | None = (
        None  # of pass@k; None: those of 1, 10, 100 there can be
    )
    temperatures: tuple[float, ...] | None = None  # None: greedy, or 0.8 for several
    top_p: float | None = None  # None: 0.95 where texts are drawn (Chen et al. 2021)
    seed: int = 0
    shots: int | None = None  # examples in the prompt
    max_new_tokens: int | None = None
    batch_size: int = 16

    def settled(self, task: Task) -> "TaskSettings":
        """These settings for a task, with a value for each.

        Raises:
          UserError: settings that contradict each other, or do not fit the task.
        """
        if not isinstance(task, AnswerTask | CodeTask):
            return TaskSettings(
                limit=self.limit, batch_size=self.batch_size, k=(), temperatures=()
            )
        if self.samples > 1 and not repeats(task):
            return dataclasses.replace(self, samples=1, k=None).settled(task)
        usual = (0.0,) if self.samples == 1 else (_WARM,)
        temperatures = usual if self.temperatures is None else self.temperatures
        if self.samples > 1 and 0.0 in temperatures:
            raise UserError(
                f"--samples={self.samples} at temperature 0 are the same text "
                f"{self.samples} times; give --temperature=0.8, or one sample."
            )
        k = (
            tuple(k for k in _USUAL_K if k <= self.samples)
            if self.k is None
            else self.k
        )
        if max(k) > self.samples:
            raise UserError(
                f"--k={max(k)} is more than --samples={self.samples}; pass@k needs at "
                "least k samples."
            )
        drawn = any(t > 0 for t in temperatures)
        return dataclasses.replace(
            self,
            k=k,
            temperatures=temperatures,
            top_p=(0.95 if drawn else 1.0) if self.top_p is None else self.top_p,
            shots=task.shots if self.shots is None else self.shots,
            max_new_tokens=self.max_new_tokens or task.max_new_tokens,
        )


def repeats(task: Task) -> bool:
    """True for a task of which several samples say more than one."""
    return isinstance(task, CodeTask) or (
        isinstance(task, AnswerTask) and task.repeated
    )


def settings_of_use(task: Task) -> set[str]:
    """Names of the settings that results of a task depend on, `decoder` among them."""
    of_use = {"limit", "batch_size"}
    if isinstance(task, AnswerTask | CodeTask):
        of_use |= {
            "temperatures",
            "top_p",
            "seed",
            "shots",
            "max_new_tokens",
            "decoder",
        }
    return of_use | ({"samples", "k"} if repeats(task) else set())


def check_of_use(tasks: Sequence[Task], given: Sequence[str]) -> None:
    """Refuses settings that no task has a use for.

    Raises:
      UserError: naming the first.
    """
    of_use = set().union(*map(settings_of_use, tasks))
    for name in given:
        if name not in of_use:
            option = "temperature" if name == "temperatures" else name
            names = ", ".join(task.name for task in tasks)
            raise UserError(f"--{option} is of no use to {names}; leave it out.")


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task, its settings and its examples."""

    task: Task
    settings: TaskSettings  # settled
    path: pathlib.Path
    sha256: str  # of the file
    numbers: list[str]  # of the examples: `task_id` of a row, else its number
    examples: list[Any]  # of the kind of the task
    shown: str  # text in front of every prompt


def load_task(task: Task, data: str, settings: TaskSettings) -> TaskData:
    """Reads and checks the data of a task, before any model is there.

    Args:
      task: from `task_named`.
      data: its file, or a folder that has it.
      settings: of the measurement.

    Raises:
      UserError: no such file, a file that is empty or has not the columns, rows that
        are not as they should be, settings that do not fit.
    """
    settings = settings.settled(task)
    path = find_data(task, data)
    form, rows, sha256 = read_rows(task, path)
    shown = ""
    numbered = [dict(row, **{_NUMBER: i}) for i, row in enumerate(rows, start=1)]
    if isinstance(task, AnswerTask | CodeTask):
        before, numbered = task.split(numbered, settings.shots or 0)
        examples = [example_of(form, row, _where(path, row)) for row in before]
        parts = [f"{x.prompt}{x.shown}{task.between}" for x in examples]
        shown = "".join([task.before, *parts])
    chosen = numbered[: settings.limit]
    if not chosen:
        raise UserError(
            f"{path} has {len(rows)} rows, none of them to measure {task.name} on: "
            f"{settings.shots} are examples in the prompt; give more, or --shots=0."
        )
    found = [example_of(form, row, _where(path, row)) for row in chosen]
    if isinstance(task, AnswerTask):
        task.score("", found[0].answers)  # a package that it needs may not be there
    return TaskData(
        task,
        settings,
        path,
        sha256,
        [str(row.get("task_id", row[_NUMBER])) for row in chosen],
        found,
        shown,
    )


def _where(path: pathlib.Path, row: dict[str, Any]) -> str:
    return f"{path}: row {row[_NUMBER]}"
