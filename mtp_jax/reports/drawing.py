"""Panels about runs, and how they are drawn on matplotlib's axes.

Axes: N heads, K bins of positions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtp_jax.reports.bins import Binned
from mtp_jax.reports.palette import RUN_COLOURS, Palette
from mtp_jax.reports.printable import printable

try:
    import matplotlib.colors
    import matplotlib.ticker
except ImportError:  # then nothing is drawn
    pass

Axes = Any
_FEW = 40  # points of a curve that are shown as such
DATA = "data"  # the group of an SVG that shows what was measured; ids get numbers
_MARKS = 400  # places along a panel where restarts can be told apart
_DASHES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line with the band that it lies in, or dots that are joined."""

    points: Binned
    label: str  # empty: none in the legend
    head: tuple[int, int] | None = None  # its head, of so many
    run: int | None = None  # its run, if there is no head
    dots: bool = False  # of few measurements


@dataclasses.dataclass(frozen=True)
class Panel:
    """A picture with a name, a title, and a note on what is to be seen."""

    name: str
    title: str
    note: str
    draw: Callable[[Axes, Palette], None]


def draw_curves(
    axes: Axes,
    palette: Palette,
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    restarts: Sequence[float] = (),
    skipped: Sequence[float] = (),
    log: bool = False,
) -> None:
    """Draws curves, with what lies between them and their axis.

    Args:
      axes: to draw on.
      palette: of colours.
      curves: those without a finite point are left out, and said to be.
      x, y: names of the axes.
      restarts: along x, where the run was started again.
      skipped: along x, steps that were not finite.
      log: a logarithmic axis, if every value is above 0.
    """
    shown = [curve for curve in curves if len(curve.points.x)]
    for curve in shown:
        _draw_curve(axes, palette, curve)
    if log and shown and all(c.points.low.min() > 0 for c in shown):
        axes.set_yscale("log")
        decades = np.log10(max(c.points.high.max() for c in shown))
        decades -= np.log10(min(c.points.low.min() for c in shown))
        subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    if not shown:
        axes.text(
            0.5, 0.5, "no finite number", ha="center", color=palette.faint,
            transform=axes.transAxes, gid=DATA,
        )  # fmt: skip
    along = axes.get_xaxis_transform()
    if len(restarts):
        axes.vlines(
            _apart(restarts), 0, 1, transform=along, colors=palette.faint,
            linestyles="dashed", linewidth=0.8, zorder=0,
        )  # fmt: skip
    if len(skipped):
        axes.vlines(
            _apart(skipped), 0, 0.05, transform=along, colors=palette.bad, linewidth=1.2
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(_number))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
    handles = [h for h in axes.get_lines() if h.get_label()[:1] != "_"]
    if len(handles) > 1:
        axes.legend(
            handles, [h.get_label() for h in handles], loc="upper left",
            ncols=-(-len(handles) // 14), columnspacing=1,
            bbox_to_anchor=(1.0, 1.02), borderaxespad=0, handlelength=1.4,
        )  # fmt: skip


def draw_bars(
    axes: Axes,
    palette: Palette,
    groups: Sequence[tuple[str, int | None, Sequence[float]]],
    *,
    x: str,
    y: str,
) -> None:
    """Draws values of heads as bars, of several runs side by side.

    Args:
      axes: to draw on.
      palette: of colours.
      groups: label, number of the run or None for the colours of heads, values by head.
      x, y: names of the axes.
    """
    width = 0.8 / len(groups)
    most = max(len(values) for *_, values in groups)
    for i, (label, run, values) in enumerate(groups):
        at = np.arange(1, len(values) + 1) + (i - (len(groups) - 1) / 2) * width
        colours = (
            [palette.head(h, len(values)) for h in range(1, len(values) + 1)]
            if run is None
            else RUN_COLOURS[run % len(RUN_COLOURS)]
        )
        bars = axes.bar(at, values, 0.9 * width, color=colours, label=_label(label),
                         gid=DATA)  # fmt: skip
        if len(groups) * most <= 12:
            axes.bar_label(bars, fmt="{:.2f}", fontsize=9, color=palette.ink)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    if len(groups) > 1:
        axes.legend(loc="upper right")


def draw_map(
    axes: Axes,
    palette: Palette,
    edges: np.ndarray,
    values_NK: np.ndarray,
    *,
    x: str,
    y: str,
) -> None:
    """Draws shares from 0 to 1 by head and bin; a bin without any stays empty.

    Args:
      axes: to draw on.
      palette: of colours.
      edges: of the bins, [K+1].
      values_NK: shares; NaN for none.
      x, y: names of the axes.
    """
    n = len(values_NK)
    levels = np.linspace(0, 1, 21)
    norm = matplotlib.colors.BoundaryNorm(levels, 256)
    mesh = axes.pcolormesh(
        edges, np.arange(n + 1) + 0.5, np.ma.masked_invalid(values_NK), cmap="viridis",
        norm=norm, gid=DATA,
    )  # fmt: skip
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    bar = axes.figure.colorbar(mesh, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1], pad=0.02)
    bar.ax.tick_params(colors=palette.ink)
    bar.outline.set_visible(False)


def draw_shares(axes: Axes, palette: Palette, shares: dict[str, float]) -> None:
    """Draws shares of a whole as bars, the largest above."""
    names = sorted(shares, key=shares.__getitem__)
    colours = [RUN_COLOURS[0] if name == "step" else palette.faint for name in names]
    bars = axes.barh(list(map(_label, names)), [100 * shares[n] for n in names],
                     color=colours, gid=DATA)  # fmt: skip
    axes.bar_label(bars, fmt="{:.1f}%", fontsize=9, color=palette.ink, padding=2)
    axes.set_xlabel("% of wall time")
    axes.set_xlim(0, 115)
    axes.set_xticks([0, 25, 50, 75, 100])


def _draw_curve(axes: Axes, palette: Palette, curve: Curve) -> None:
    points, dashes = curve.points, "-"
    if curve.head is not None:
        colour = palette.head(*curve.head)
    elif curve.run is not None:
        colour = RUN_COLOURS[curve.run % len(RUN_COLOURS)]
        dashes = _DASHES[curve.run // len(RUN_COLOURS) % len(_DASHES)]
    else:
        colour = palette.ink
    if curve.dots:
        axes.plot(
            points.x, points.mean, color=colour, label=_label(curve.label),
            linestyle=":", linewidth=1, marker="o", markersize=3.5, gid=DATA,
        )  # fmt: skip
        return
    if np.any(points.high > points.low):
        axes.fill_between(
            points.x,
            points.low,
            points.high,
            color=colour,
            alpha=0.18,
            linewidth=0,
            gid=DATA,
        )
    few = len(points.x) <= _FEW
    axes.plot(
        points.x, points.mean, color=colour, label=_label(curve.label),
        linestyle=dashes, marker="." if few else "", markersize=5,
        gid=DATA,
    )  # fmt: skip


def _label(text: str) -> str:
    """A text as a label; one that begins with an underscore would be hidden."""
    text = printable(text).replace("\n", " ").replace("\t", " ")
    text = text if len(text) <= 25 else f"{text[:11]}...{text[-11:]}"
    return f"\u200b{text}" if text.startswith("_") else text or "_"


def _apart(marks: Sequence[float]) -> np.ndarray:
    """Places, without those that would be drawn over others."""
    places = np.unique(np.asarray(marks, np.float64))
    if len(places) <= _MARKS:
        return places
    width = (places[-1] - places[0]) / _MARKS
    _, first = np.unique((places - places[0]) // width, return_index=True)
    return places[first]


def _number(value: float, _: int) -> str:
    """A number at an axis: 0.005, 20, 1.5k, 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
