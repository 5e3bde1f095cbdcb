"""Panels as SVG for a page light and dark, and as pictures, by matplotlib.

No text of a panel is mathematics, and no setting of the user's matplotlib counts.
"""

import contextlib
import io
import itertools
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.reports.drawing import DATA, Axes, Panel
from mtp_jax.reports.palette import Light, OfPage, Palette
from mtp_jax.reports.printable import printable

try:
    import matplotlib
    import matplotlib.figure
except ImportError:
    matplotlib = None

SOFTWARE = "mtp-jax report"  # pictures say that they are of it
_WIDTH, _HEIGHT = 4.8, 2.9  # inches of a panel
_SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
    "path.simplify": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "mtp-jax",
    "text.parse_math": False,
}


def require_matplotlib() -> None:
    """Checks that the extra `report` is installed.

    Raises:
      UserError: it is not.
    """
    if matplotlib is None:
        raise UserError("report needs matplotlib; pip install 'mtp-jax[report]'.")


def svg_of(panel: Panel, key: str) -> str:
    """A panel as an SVG element to stand in a page.

    Its colours are light or dark as the page is, by the variables --ink, --dim and
    --bad.

    Args:
      panel: to draw.
      key: begins its ids, so that no other panel of the page has the same.
    """
    palette = OfPage()
    with _settings():
        figure = matplotlib.figure.Figure(figsize=(_WIDTH, _HEIGHT))
        figure.patch.set_alpha(0)
        _draw(panel, figure.subplots(), palette)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", _shorter, text)
    count = itertools.count()
    text = re.sub(f'\\bid="{DATA}"', lambda _: f'id="{DATA}-{next(count)}"', text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r"(url\(|href=\")#", rf"\1#{key}-", text)
    for colour, css in palette.css.items():
        text = text.replace(colour, css)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    return re.sub(r' (?:width|height)="[^"]*pt"', "", text, count=2)


def _shorter(tag: re.Match[str]) -> str:
    """A tag whose coordinates have two decimals."""
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", tag[0])


def write_picture(
    panels: Sequence[Panel], path: Any, kind: Literal["png", "pdf", "svg"]
) -> None:
    """Writes panels side by side, on white paper."""
    across = min(len(panels), 1 + (len(panels) > 1) + (len(panels) > 6))
    down = -(-len(panels) // across)
    creator = "Software" if kind == "png" else "Creator"
    with _settings():
        figure = matplotlib.figure.Figure(figsize=(_WIDTH * across, _HEIGHT * down))
        every = np.ravel(figure.subplots(down, across, squeeze=False))
        for axes in every[len(panels) :]:
            axes.set_axis_off()
        for panel, axes in zip(panels, every, strict=False):
            _draw(panel, axes, Light())
            axes.set_title(printable(panel.title), loc="left")
        figure.savefig(path, format=kind, dpi=200, metadata={creator: SOFTWARE})


def _draw(panel: Panel, axes: Axes, palette: Palette) -> None:
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_color(palette.faint)
    axes.grid(color=palette.faint, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    panel.draw(axes, palette)
    axes.tick_params(which="both", color=palette.faint, labelcolor=palette.ink)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(palette.ink)
    if (legend := axes.get_legend()) is not None:
        for text in legend.get_texts():
            text.set_color(palette.ink)


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """A context with matplotlib as it comes, and `_SETTINGS`; it says nothing."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that a font lacks, above all
        logger.setLevel(logging.ERROR)
        try:
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_SETTINGS)
            yield
        finally:
            logger.setLevel(level)
