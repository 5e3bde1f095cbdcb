"""Figures of runs as rows of cells: how far each is, evaluations, tasks.

A file of figures may come from anywhere: what is no number is shown as -.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtp_jax.errors import UserError, counted
from mtp_jax.eval.comparison import compare_runs
from mtp_jax.model.sizes import sizes_of
from mtp_jax.reports.run_data import RunData
from mtp_jax.reports.task_table import comparison_table, drafting_line
from mtp_jax.run.log_columns import Log
from mtp_jax.run.screen import duration

Rows = list[list[str]]


def summary_rows(runs: Sequence[RunData]) -> Rows:
    """A row a run: how far it is, and its last figures."""
    header = ["run", "step", "parameters", "heads", "loss, head 1", "held-out loss"]
    header += ["accuracy", "bits/byte", "tokens a pass"]
    header += ["positions/s", "in steps", "wall time"]
    return [header, *map(_summary, runs)]


def _summary(run: RunData) -> list[str]:
    steps = "?" if run.config is None else f"{run.config.train.steps:,}"
    done = " done" if run.finished else ""
    total = sum(run.goodput.values())
    in_steps = run.goodput.get("step", 0.0) / total if total else None
    speeds = run.metrics.column("tokens_per_s")
    speed = float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None
    heldout = run.heldout
    return [
        run.name,
        f"{run.metrics.step[-1]:,.0f} of {steps}{done}",
        "-" if run.config is None else _size(sizes_of(run.config.model).total),
        str(run.heads),
        _last(run.metrics, "loss/head_1"),
        _last(heldout, "loss/head_1"),
        _last(heldout, "accuracy/head_1"),
        _last(heldout, "bits_per_byte"),
        _last(heldout, "accept/length", 2),
        _figure(speed, 0),
        "-" if in_steps is None else f"{in_steps:.0%}",
        duration(total) if total else "-",
    ]


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f} M"


def _last(log: Log, name: str, digits: int = 4) -> str:
    column = log.column(name)
    return _figure(float(column[-1]) if len(column) else None, digits)


def _figure(value: Any, digits: int = 4) -> str:
    """A number with so many decimals; - for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-"
    return f"{value:,.{digits}f}" if math.isfinite(value) else str(value)


def evaluation_rows(content: dict[str, Any]) -> tuple[str, Rows]:
    """A line on what was evaluated, and a row a head.

    Raises:
      ValueError: the content is not that of an evaluation.
    """
    return _checked(_evaluation, content)


def task_rows(content: dict[str, Any]) -> Rows:
    """A row a metric of a task, without its name.

    Raises:
      ValueError: the content is not that of a task's result.
    """
    return _checked(_task, content)


def _checked(function: Callable[[Any], Any], content: dict[str, Any]) -> Any:
    try:
        return function(content)
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(str(error)) from error


def _evaluation(content: dict[str, Any]) -> tuple[str, Rows]:
    accept = content.get("accept") or {}
    agrees = [1.0, *accept.get("by_head", [])]
    sampled = [1.0, *accept.get("sampled", [])]
    header = ["head", "loss (nats)", "perplexity", "accuracy", "greedy drafts accepted"]
    rows = [header + (["sampled drafts accepted"] if len(sampled) > 1 else [])]
    for i, head in enumerate(content["heads"]):
        cells = [str(head["offset"]), _figure(head["loss"])]
        cells += [_figure(head["perplexity"], 3), _figure(head["accuracy"])]
        of_lists = [agrees, sampled] if len(sampled) > 1 else [agrees]
        cells += [_figure(x[i] if i < len(x) else None) for x in of_lists]
        rows.append(cells)
    about = (
        f"step {content.get('step')}, {_figure(content['bits_per_byte'])} bits per "
        f"byte of {counted(int(content.get('tokens') or 0), 'token')}, "
        f"{_figure(accept.get('length'), 3)} tokens a pass; "
        f"{', '.join(map(str, content.get('data') or []))}"
    )
    return about, rows


def _task(content: dict[str, Any]) -> Rows:
    settings = content.get("settings") or {}
    drafting = content.get("drafting")
    rows = []
    for metric, found in content["metrics"].items():
        at = f", temperature {found['temperature']:g}" if "temperature" in found else ""
        rows.append(
            [
                f"{metric}{at}",
                _figure(found["value"]),
                f"{_figure(found.get('low'))} to {_figure(found.get('high'))}",
                str(len(content["items"])),
                str(settings.get("step", "-")),
                "" if drafting is None else drafting_line(drafting),
            ]
        )
    return rows


def compared_rows(runs: Sequence[RunData]) -> Rows | str:
    """Tasks by runs, with intervals of the differences; or why there are none."""
    having = [run for run in runs if run.tasks]
    if len(having) < 2:
        return []
    try:
        rows = compare_runs([str(run.workdir) for run in having])
    except UserError as error:
        return str(error)
    except (TypeError, LookupError, ValueError) as error:
        return f"results of tasks do not fit each other ({type(error).__name__})"
    return comparison_table(rows, [run.name for run in having])
