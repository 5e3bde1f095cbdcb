"""The panels of a run, and those that set several runs side by side.

Axes: N heads, K bins of positions.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from mtp_jax.eval.by_position import PositionAccuracy
from mtp_jax.reports.bins import binned
from mtp_jax.reports.drawing import (
    Curve,
    Panel,
    draw_bars,
    draw_curves,
    draw_map,
    draw_shares,
)
from mtp_jax.reports.run_data import RunData
from mtp_jax.run.log_columns import Log
from mtp_jax.run.screen import duration

_POINTS = 6000  # of all curves of a panel; a curve has at most 240 and at least 40
_MOST, _LEAST = 240, 40
_UNITS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_HELDOUT = "dotted: held out"


@dataclasses.dataclass(frozen=True)
class _Along:
    """An axis along a run: where its records are, and its restarts."""

    name: str
    at: np.ndarray  # float64 [R], of the records of steps
    restarts: list[float]
    skipped: np.ndarray  # steps that were not finite

    def marks(self) -> dict[str, object]:
        """Arguments of every panel along this axis."""
        return {"x": self.name, "restarts": self.restarts, "skipped": self.skipped}


def panels_of(run: RunData, accuracy: PositionAccuracy | None) -> list[Panel]:
    """The panels of a run; those of which its files hold nothing are left out.

    Args:
      run: its files.
      accuracy: of its model on held-out text; None: it is not known.
    """
    steps, wall = _steps(run), _time(run)
    found = [
        _by_head(run, steps, "loss", "Loss by head", "nats a target"),
        _by_head(run, steps, "accuracy", "Accuracy by head", "share of targets"),
        _tokens_a_pass(run, steps),
        _drafts(run, steps),
        _heldout_curve(run, "bits_per_byte", "bits", "Bits per byte, held out"),
        _throughput(run, wall),
        _goodput(run, wall),
        _where_time_went(run),
        _one(run, steps, "lr", "rate", "Learning rate", "rate of a step"),
        _gradients(run, steps),
        _meter(run, steps, "cosine", "Gradients of heads, cosine to head 1's"),
        _meter(run, steps, "norm_ratio", "Gradients of heads, size over head 1's"),
    ]
    if accuracy is not None:
        found += [_positions(accuracy), distances([(run.name, accuracy)])]
    return [panel for panel in found if panel is not None]


def comparison_panels(
    runs: Sequence[RunData], accuracies: Sequence[PositionAccuracy | None]
) -> list[Panel]:
    """The panels of several runs, each in a colour of its own."""
    figures = (
        ("loss/head_1", "loss", "Loss of head 1", "nats a target"),
        ("accuracy/head_1", "accuracy", "Accuracy of head 1", "share of targets"),
        ("accept/length", "tokens", "Tokens a pass that heads agree on", "tokens"),
        ("bits_per_byte", "bits", "Bits per byte, held out", "bits per byte"),
        ("tokens_per_s", "throughput", "Throughput", "positions a second"),
        ("lr", "rate", "Learning rate", "rate of a step"),
    )
    found = [_of_runs(runs, *figure) for figure in figures]
    known = [
        (run.name, accuracy)
        for run, accuracy in zip(runs, accuracies, strict=True)
        if accuracy is not None
    ]
    numbers = [i for i, accuracy in enumerate(accuracies) if accuracy is not None]
    if known:
        found.append(distances(known, numbers))
    return [panel for panel in found if panel is not None]


def distances(
    accuracies: Sequence[tuple[str, PositionAccuracy]],
    runs: Sequence[int | None] = (None,),
) -> Panel:
    """A panel of accuracies by distance: one bar a head and run."""
    groups = [
        (name, run, accuracy.accuracy_N.tolist())
        for (name, accuracy), run in zip(accuracies, runs, strict=True)
    ]
    tokens = int(accuracies[0][1].count_NK[0].sum())
    return Panel(
        "distance",
        "Accuracy by distance",
        f"how often the most likely token is right, so many tokens ahead, on "
        f"{tokens:,} held-out targets",
        functools.partial(draw_bars, groups=groups, x="tokens ahead", y="accuracy"),
    )


def _steps(run: RunData) -> _Along:
    restarts = [float(start.after) for start in run.starts[1:]]
    log = run.metrics
    return _Along("step", log.step, restarts, log.step[_is_skipped(log)])


def _time(run: RunData) -> _Along:
    """Wall time since the first start; steps where records do not tell it."""
    times = np.maximum.accumulate(run.metrics.column("time"))
    if not np.all(np.isfinite(times)):
        return _steps(run)
    starts = [start.at for start in run.starts if start.at is not None]
    begin = min([*starts[:1], float(times[0])])
    size, name = next(
        unit for unit in _UNITS if times[-1] - begin > 2 * unit[0] or unit[0] == 1
    )
    return _Along(
        f"{name} since the first start",
        (times - begin) / size,
        [(at - begin) / size for at in starts[1:]],
        (times[_is_skipped(run.metrics)] - begin) / size,
    )


def _is_skipped(log: Log) -> np.ndarray:
    """True for records of steps whose loss or gradient was not finite."""
    bad = log.column("bad_steps") > 0
    return bad | np.isnan(log.column("loss")) if "loss" in log.columns else bad


def _curve(
    x: np.ndarray, y: np.ndarray, label: str, curves: int, **of_curve: object
) -> Curve:
    points = min(max(_POINTS // max(curves, 1), _LEAST), _MOST)
    return Curve(binned(x, y, points), label, **of_curve)  # type: ignore[arg-type]


def _panel(
    name: str, title: str, note: str, curves: list[Curve], **options: object
) -> Panel | None:
    if not curves:
        return None
    draw = functools.partial(draw_curves, curves=curves, **options)  # type: ignore[arg-type]
    return Panel(name, title, note, draw)


def _by_head(
    run: RunData, along: _Along, name: str, title: str, unit: str
) -> Panel | None:
    heads, curves = run.metrics.heads_of(name), []
    n = max([run.heads, *heads])
    for head in heads:
        column = run.metrics.column(f"{name}/head_{head}")
        of_head = {"head": (head, n)}
        curves.append(_curve(along.at, column, f"head {head}", len(heads), **of_head))
    note = "of the batch of each logged step"
    if tested := run.heldout.heads_of(name):
        note = f"{note}; {_HELDOUT}"
        curves += _dots(run, name, tested, n)
    return _panel(name, title, note, curves, y=unit, **along.marks())


def _dots(run: RunData, name: str, heads: list[int], n: int) -> list[Curve]:
    return [
        _curve(
            run.heldout.step, run.heldout.column(f"{name}/head_{head}"), "", len(heads),
            head=(head, n), dots=True,
        )
        for head in heads
    ]  # fmt: skip


def _tokens_a_pass(run: RunData, along: _Along) -> Panel | None:
    if run.heads == 1:
        return None
    curves = []
    names = (("accept/length", "greedy", 1), ("accept/sampled_length", "sampled", 2))
    for name, label, colour in names:
        for log, at, dots in (
            (run.metrics, along.at, False),
            (run.heldout, run.heldout.step, True),
        ):
            if name in log.columns:
                told = f"{label}, held out" if dots else label
                curves.append(
                    _curve(at, log.column(name), told, 1, head=(colour, 2), dots=dots)
                )
    note = "teacher-forced: 1 and the drafts in a row that head 1 would accept"
    return _panel("tokens", "Tokens a pass", note, curves, y="tokens", **along.marks())


def _drafts(run: RunData, along: _Along) -> Panel | None:
    greedy = run.heldout.heads_of("accept")
    if greedy:
        curves = _labelled(_dots(run, "accept", greedy, run.heads), greedy)
        note = "share of held-out positions where drafts up to this head are accepted"
    else:
        heads = run.heldout.heads_of("accept/sampled")
        curves = _labelled(_dots(run, "accept/sampled", heads, run.heads), heads)
        note = "probability that a draft drawn from the head is accepted, held out"
    return _panel("drafts", "Drafts accepted", note, curves, y="share", **along.marks())


def _labelled(curves: list[Curve], heads: list[int]) -> list[Curve]:
    return [
        dataclasses.replace(curve, label=f"head {head}")
        for curve, head in zip(curves, heads, strict=True)
    ]


def _heldout_curve(run: RunData, name: str, short: str, title: str) -> Panel | None:
    if name not in run.heldout.columns:
        return None
    curves = [_curve(run.heldout.step, run.heldout.column(name), "", 1, dots=True)]
    return _panel(short, title, "of each evaluation", curves, x="step", y="bits")


def _one(
    run: RunData, along: _Along, column: str, name: str, title: str, unit: str
) -> Panel | None:
    if column not in run.metrics.columns:
        return None
    curves = [_curve(along.at, run.metrics.column(column), "", 1)]
    note = "of each logged step"
    return _panel(name, title, note, curves, y=unit, **along.marks())


def _throughput(run: RunData, along: _Along) -> Panel | None:
    unit = "positions a second"
    return _one(run, along, "tokens_per_s", "throughput", "Throughput", unit)


def _goodput(run: RunData, along: _Along) -> Panel | None:
    panel = _one(run, along, "goodput", "goodput", "Goodput", "share")
    note = "share of all wall time so far that went into steps that count"
    return panel and dataclasses.replace(panel, note=note)


def _where_time_went(run: RunData) -> Panel | None:
    total = sum(run.goodput.values())
    if not total:
        return None
    shares = {kind: s / total for kind, s in run.goodput.items() if s}
    note = f"of {duration(total)} since the first start; lost: redone after a fault"
    draw = functools.partial(draw_shares, shares=shares)
    return Panel("time", "Where the time went", note, draw)


def _gradients(run: RunData, along: _Along) -> Panel | None:
    groups = [name for name in run.metrics.columns if name.startswith("grad_norm/")]
    columns = [n for n in ("grad_norm", *sorted(groups)) if n in run.metrics.columns]
    curves = [
        _curve(
            along.at, run.metrics.column(name),
            "" if not groups else name.removeprefix("grad_norm/"), len(columns),
            head=None if name == "grad_norm" else (i + 1, len(columns)),
        )
        for i, name in enumerate(columns)
    ]  # fmt: skip
    note = "before clipping"
    if count := len(along.skipped):
        note += f"; red: {count:,} logged steps that were not finite, and skipped"
    return _panel(
        "gradient", "Gradient norm", note, curves, y="norm", log=True, **along.marks()
    )


def _meter(run: RunData, along: _Along, name: str, title: str) -> Panel | None:
    heads = run.metrics.heads_of(f"gradient/{name}")
    curves = [
        _curve(
            along.at, run.metrics.column(f"gradient/{name}/head_{head}"),
            f"head {head}", len(heads), head=(head, run.heads),
        )
        for head in heads
    ]  # fmt: skip
    note = "into the trunk, of each logged step"
    return _panel(name, title, note, curves, y=name, **along.marks())


def _positions(accuracy: PositionAccuracy) -> Panel:
    edges = np.append(accuracy.starts, accuracy.last + 1)
    return Panel(
        "positions",
        "Accuracy by offset and position",
        "by tokens read before, on held-out text; empty: no target there",
        functools.partial(
            draw_map, edges=edges, values_NK=accuracy.accuracy_NK,
            x="position in the document", y="tokens ahead",
        ),
    )  # fmt: skip


def _of_runs(
    runs: Sequence[RunData], column: str, name: str, title: str, unit: str
) -> Panel | None:
    curves = []
    for i, run in enumerate(runs):
        trained = column in run.metrics.columns
        if trained:
            x, y = run.metrics.step, run.metrics.column(column)
            curves.append(_curve(x, y, run.name, len(runs), run=i))
        if column in run.heldout.columns:
            x, y = run.heldout.step, run.heldout.column(column)
            label = "" if trained else run.name
            curves.append(_curve(x, y, label, len(runs), run=i, dots=True))
    note = _HELDOUT if any(curve.dots for curve in curves) else "of each logged step"
    return _panel(name, title, note, curves, x="step", y=unit)
