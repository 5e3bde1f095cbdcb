"""Colours of what is drawn: on white paper, or as the page is, light or dark."""

import colorsys
import dataclasses
from typing import Protocol

from mtp_jax.reports.token_view import hue_of

# Colours of runs, on light and dark (Okabe and Ito's, the yellow ones left out).
RUN_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#a6761d",
    "#7f7f7f",
)
_FIRST = 0x010001  # colours from here on stand for those of a page


class Palette(Protocol):
    """Colours by what they are for."""

    ink: str
    faint: str
    bad: str

    def head(self, head: int, heads: int) -> str:
        """The colour of a head among so many."""
        ...


@dataclasses.dataclass
class Light:
    """Colours on white paper."""

    ink: str = "#1a1a1a"
    faint: str = "#8a8a8a"
    bad: str = "#c62828"

    def head(self, head: int, heads: int) -> str:
        if head == 1:
            return self.ink
        rgb = colorsys.hls_to_rgb(hue_of(head, heads) / 360, 0.4, 0.8)
        return "#" + "".join(f"{round(255 * x):02x}" for x in rgb)


class OfPage:
    """Colours that stand for CSS until the drawing is done."""

    def __init__(self):
        self.css: dict[str, str] = {}
        self.ink = self._stands_for("var(--ink)")
        self.faint = self._stands_for("var(--dim)")
        self.bad = self._stands_for("var(--bad)")

    def head(self, head: int, heads: int) -> str:
        if head == 1:
            return self.ink
        hue = hue_of(head, heads)
        return self._stands_for(f"light-dark(hsl({hue} 80% 38%), hsl({hue} 75% 62%))")

    def _stands_for(self, css: str) -> str:
        for colour, other in self.css.items():
            if other == css:
                return colour
        colour = f"#{_FIRST + len(self.css):06x}"
        self.css[colour] = css
        return colour
