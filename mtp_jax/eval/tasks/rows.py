"""Rows of a task's file, and the task of a user's own file."""

import gzip
import hashlib
import importlib.util
import json
import pathlib
import zlib
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.eval.tasks import TASKS
from mtp_jax.eval.tasks.kinds import Form, Row, Task, TextTask

_KINDS = ("ChoiceTask", "AnswerTask", "CodeTask", "TextTask")


def task_named(name: str) -> Task:
    """The task of a name, or of a Python file with `TASK = ...` in it.

    Raises:
      UserError: there is none.
    """
    if not name.endswith(".py"):
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise UserError(
                f"--tasks={name} is unknown; there are {known}, and FILE.py with a "
                "task of yours."
            )
        return TASKS[name]
    if not pathlib.Path(name).is_file():
        raise UserError(f"--tasks={name} is no file.")
    spec = importlib.util.spec_from_file_location("task_of_user", name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a task is code, and may do anything
        raise UserError(f"--tasks={name}: {type(error).__name__}: {error}.") from error
    task: Any = getattr(module, "TASK", None)
    if type(task).__name__ not in _KINDS:
        raise UserError(
            f"--tasks={name} has no TASK that is one of {', '.join(_KINDS)} of "
            "mtp_jax.eval.tasks.kinds."
        )
    return task


def find_data(task: Task, data: str) -> pathlib.Path:
    """The file of a task: `data`, or in that folder a file of one of its names.

    Raises:
      UserError: there is none.
    """
    path = pathlib.Path(data)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"--data={data} is neither a file nor a folder.")
    places = [p / name for p in (path / task.name, path) for name in task.files]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"--data={data} has no file of {task.name}; it may be called "
        f"{', '.join(task.files)}, here or in a folder {task.name}."
    )


def read_rows(task: Task, path: pathlib.Path) -> tuple[Form[Any], list[Row], str]:
    """The form of a task's file, its rows, and the SHA-256 of its bytes.

    JSON objects, a line each or as one list, plain or .gz. A text of `TextTask` may
    also be a file of its own.

    Raises:
      UserError: it cannot be read, is empty, or has not the columns of any form.
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
        text = data.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    digest = hashlib.sha256(raw).hexdigest()
    if isinstance(task, TextTask) and ".json" not in path.name:
        rows = [{"text": text}] if text else []
        form = Form(("text",), lambda row: row["text"])
        _require_rows(path, rows)
        return form, rows, digest
    rows = _parsed(path, text)
    _require_rows(path, rows)
    return _form_of(task, path, rows), rows, digest


def _require_rows(path: pathlib.Path, rows: list[Row]) -> None:
    if not rows:
        raise UserError(f"{path} is empty; give a file with at least a row.")


def _parsed(path: pathlib.Path, text: str) -> list[Row]:
    """Rows of JSON; a line ends with a line feed and with nothing else."""
    lines = [line for line in text.split("\n") if line.strip()]
    if text.lstrip().startswith("["):
        lines = [text]
    values: list[Any] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: line {number} is not JSON.") from None
        values += value if isinstance(value, list) else [value]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise UserError(f"{path}: row {number} is not a JSON object.")
    return values


def _form_of(task: Task, path: pathlib.Path, rows: list[Row]) -> Form[Any]:
    """The form whose columns the first row has; all others must have them, too."""
    for form in task.forms:
        if all(column in rows[0] for column in form.columns):
            break
    else:
        columns = " or ".join(", ".join(form.columns) for form in task.forms)
        raise UserError(
            f"{path}: row 1 has the columns {', '.join(map(str, rows[0]))}; "
            f"{task.name} needs {columns}."
        )
    for number, row in enumerate(rows, start=1):
        for column in form.columns:
            if column not in row:
                raise UserError(f"{path}: row {number} has no column {column}.")
    return form


def example_of(form: Form[Any], row: Row, where: str) -> Any:
    """The example of a row.

    Raises:
      UserError: a column is not what it should be; `where` tells the row.
    """
    try:
        return form.make(row)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where} is not as the task needs it: {type(error).__name__}: {error}."
        ) from None
