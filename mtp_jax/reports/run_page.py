"""A page about runs: what its template shows, put together."""

import dataclasses
import importlib.resources
import time
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

import mtp_jax
from mtp_jax.decode.generation import totals
from mtp_jax.errors import counted
from mtp_jax.reports import token_view
from mtp_jax.reports.drawing import Panel
from mtp_jax.reports.model_view import ModelView
from mtp_jax.reports.pictures import SOFTWARE, svg_of
from mtp_jax.reports.printable import printable
from mtp_jax.reports.result_tables import (
    Rows,
    compared_rows,
    evaluation_rows,
    summary_rows,
    task_rows,
)
from mtp_jax.reports.run_data import (
    RunData,
    Start,
    config_differences,
    config_rows,
)
from mtp_jax.reports.run_panels import comparison_panels, panels_of
from mtp_jax.run.workdirs import told_time

_TASK_HEADER = ["task", "metric", "value", "95% interval", "examples", "step", ""]


def run_page(runs: Sequence[RunData], views: Sequence[ModelView | str]) -> str:
    """A page about runs as HTML that needs nothing but a browser.

    Args:
      runs: at least one.
      views: of each, its model on held-out text, or why that is left out.
    """
    accuracies = [None if isinstance(v, str) else v.accuracy for v in views]
    several = len(runs) > 1
    compared = compared_rows(runs) if several else []
    notes = [compared] if isinstance(compared, str) else []
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined
    ).from_string(_template())
    return template.render(
        title=f"Runs {_listed(runs)}" if several else f"Run {printable(runs[0].name)}",
        software=SOFTWARE,
        made=f"{told_time(time.time())}, mtp_jax {mtp_jax.__version__}",
        token_style=markupsafe.Markup(token_view.TOKEN_STYLE),
        summary=_safe(summary_rows(runs)),
        comparison=(
            _drawn(comparison_panels(runs, accuracies), "all") if several else []
        ),
        differences=_safe(config_differences(runs)) if several else [],
        compared=[] if notes else _safe(compared),
        runs=[
            _run(run, view, f"run-{i}", notes if i == 1 else [])
            for i, (run, view) in enumerate(zip(runs, views, strict=True), 1)
        ],
    )


def _template() -> str:
    file = importlib.resources.files("mtp_jax.reports") / "run_page.html"
    return file.read_text(encoding="utf-8")


def _listed(runs: Sequence[RunData]) -> str:
    return printable(", ".join(run.name for run in runs))


def _safe(value: Any) -> Any:
    """Texts of nested lists, without control characters."""
    if isinstance(value, str):
        return printable(value)
    return [_safe(x) for x in value] if isinstance(value, (list, tuple)) else value


def _drawn(panels: Sequence[Panel], key: str) -> list[dict[str, Any]]:
    return [
        {
            "key": f"{key}-{panel.name}",
            "title": panel.title,
            "note": panel.note,
            "svg": markupsafe.Markup(svg_of(panel, f"{key}-{panel.name}")),
        }
        for panel in panels
    ]


def _run(
    run: RunData, view: ModelView | str, key: str, also: Sequence[str]
) -> dict[str, Any]:
    """A run as the template shows it."""
    notes = [*run.notes, *also]
    if isinstance(view, str):
        notes.append(f"accuracy on held-out text, and texts: {view}")
    evaluations = []
    for name, content in run.evaluations:
        try:
            evaluations.append((name, *evaluation_rows(content)))
        except ValueError:
            notes.append(f"{name}.json is no file of figures")
    config = [] if run.config is None else config_rows(run.config)
    return {
        "key": key,
        "name": printable(run.name),
        "about": printable(str(run.workdir)),
        "tasks": _tasks(run, notes),
        "panels": _drawn(
            panels_of(run, None if isinstance(view, str) else view.accuracy), key
        ),
        "evaluations": _safe(evaluations),
        "samples": [_shown(sample) for sample in run.samples[-20:]],
        "starts": [_start(start) for start in run.starts],
        "config": [(f, printable(value), usual) for f, value, usual in config],
        "others": sum(not usual for *_, usual in config),
        "facts": _safe(run.facts),
        "notes": _safe(notes),
        **_texts(view, key),
    }


def _shown(sample: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(sample)
    return {name: _safe(value) for name, value in fields.items()}


def _start(start: Start) -> dict[str, Any]:
    return {
        "after": f"{start.after:,}",
        "at": told_time(start.at),
        "devices": "" if start.devices is None else start.devices,
        "processes": "" if start.processes is None else start.processes,
        "changes": _safe(start.changes),
    }


def _tasks(run: RunData, notes: list[str]) -> Rows:
    """A table of all tasks; empty if there are none."""
    rows = []
    for name, content in run.tasks:
        try:
            rows += [[name, *row] for row in task_rows(content)]
        except ValueError:
            notes.append(f"{name}.json is no result of a task")
    return _safe([_TASK_HEADER, *rows]) if rows else []


def _texts(view: ModelView | str, key: str) -> dict[str, Any]:
    """The coloured texts of a model, if there is one."""
    if isinstance(view, str):
        return {"texts": "", "head_styles": ""}
    heads = max(1, *(head for text in view.texts for head in text.heads))
    of_all = totals(view.texts)
    written = (
        f"{counted(round(of_all.tokens), 'token')} in "
        f"{counted(of_all.forwards, 'forward pass')}, "
        f"{of_all.tokens_per_forward:.2f} tokens a pass"
    )
    articles = [
        token_view.article(text, view.tokenizer, i, level=4)
        for i, text in enumerate(view.texts, 1)
    ]
    return {
        "texts": markupsafe.Markup("\n".join(articles)),
        "head_styles": markupsafe.Markup(token_view.head_styles(heads, f"#{key} ")),
        "legend": markupsafe.Markup(token_view.legend(view.texts, heads)),
        "step": f"{view.step:,}",
        "decoder": view.decoder,
        "written": written,
    }
