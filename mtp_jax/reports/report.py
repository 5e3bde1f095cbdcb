"""The report of runs, as a page or as pictures, written into a file."""

import os
import pathlib
from collections.abc import Sequence
from typing import Literal

from mtp_jax.errors import UserError
from mtp_jax.reports.drawing import Panel
from mtp_jax.reports.model_view import ModelView, look_at_model
from mtp_jax.reports.pictures import SOFTWARE, require_matplotlib, write_picture
from mtp_jax.reports.run_data import RunData, read_runs
from mtp_jax.reports.run_page import run_page
from mtp_jax.reports.run_panels import comparison_panels, panels_of
from mtp_jax.storage import whole_file, write_atomically

Format = Literal["html", "png", "pdf", "svg"]
FORMATS: tuple[Format, ...] = ("html", "png", "pdf", "svg")
# How files of reports begin, and what else is in them.
_OURS = {
    b"<!DOCTYPE html>": f'<meta name="generator" content="{SOFTWARE}">'.encode(),
    b"\x89PNG": b"Software\0" + SOFTWARE.encode(),
    b"%PDF": b"/Creator (" + SOFTWARE.encode() + b")",
    b"<?xml": f"<dc:title>{SOFTWARE}</dc:title>".encode(),
}
_NO_MODEL = "files alone were asked for"


def report(
    workdirs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    form: Format = "html",
    figures: Sequence[str] | None = None,
    data: Sequence[str | os.PathLike[str]] | None = None,
    texts: int = 3,
    files_only: bool = False,
) -> list[str]:
    """Writes a page about runs, or a picture of their figures.

    Args:
      workdirs: of runs; also of those that go on.
      output: path of the file; a report that is there is written over.
      form: a page that needs nothing but a browser, or a picture.
      figures: names of those in a picture; None: all.
      data: folders of prepared corpora for held-out text; None: those of each run.
      texts: held-out prompts that each model continues.
      files_only: load no model, so that there is nothing about held-out text but what
        the files hold.

    Returns:
      A line for each thing that was left out, with the reason.

    Raises:
      UserError: no such run, one without records, a figure that there is not, or a file
        that is there and no report, or cannot be written.
    """
    require_matplotlib()
    path = pathlib.Path(output)
    _refuse_others_file(path)
    if figures is not None and form == "html":
        raise UserError("figures are chosen for pictures; a page has all of them.")
    if isinstance(workdirs, str | os.PathLike):
        workdirs = [workdirs]
    runs = read_runs(workdirs)
    needs_model = figures is None or {"positions", "distance"} & set(figures)
    views: list[ModelView | str] = [
        _NO_MODEL
        if files_only or not needs_model
        else look_at_model(run.workdir, data=data, texts=texts if form == "html" else 0)
        for run in runs
    ]
    try:
        if form == "html":
            write_atomically(path, run_page(runs, views))
        else:
            panels = _chosen(runs, views, figures)
            with whole_file(path) as part:
                write_picture(panels, part, form)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    return _left_out(runs, views)


def _refuse_others_file(path: pathlib.Path) -> None:
    """Raises UserError for a file with something else than a report in it."""
    if not path.is_file():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    ours = (m for begin, m in _OURS.items() if content.startswith(begin))
    if content and not any(mark in content for mark in ours):
        raise UserError(
            f"{path} is there already and no report; give another path, or remove it."
        )


def _chosen(
    runs: Sequence[RunData],
    views: Sequence[ModelView | str],
    figures: Sequence[str] | None,
) -> list[Panel]:
    """The panels of a picture, in the order of their names."""
    accuracies = [None if isinstance(v, str) else v.accuracy for v in views]
    if len(runs) > 1:
        panels = comparison_panels(runs, accuracies)
    else:
        panels = panels_of(runs[0], accuracies[0])
    if figures is None:
        return panels
    by_name = {panel.name: panel for panel in panels}
    for name in figures:
        if name not in by_name:
            why = "".join(f" ({v})" for v in views if isinstance(v, str))
            why = why if name in ("positions", "distance") else ""
            raise UserError(
                f"there is no figure {name!r} of {', '.join(r.name for r in runs)}"
                f"{why}; there are {', '.join(by_name)}."
            )
    return [by_name[name] for name in figures]


def _left_out(runs: Sequence[RunData], views: Sequence[ModelView | str]) -> list[str]:
    lines = []
    for run, view in zip(runs, views, strict=True):
        lines += [f"{run.name}: {note}" for note in run.notes]
        if isinstance(view, str) and view is not _NO_MODEL:
            lines.append(f"{run.name}: accuracy on held-out text, and texts: {view}")
    return lines
