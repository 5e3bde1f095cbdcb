"""Output of a run for people: lines, and on a terminal a progress bar below them."""

import contextlib
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable

from mtp_jax.errors import say

COMMAND = "next: "  # begins a line with a command to copy
_DRAW_EVERY_S = 0.1
_BAR = 30  # characters, at most
# The kinds of `Goodput` that last; each step is too short to tell.
_PHASES = {
    "compile": "compiling ...",
    "restore": "looking for a checkpoint ...",
    "evaluate": "evaluating ...",
    "save": "saving ...",
}
_CLEAR = "\r\x1b[2K"


class Screen:
    """Prints lines on stdout; on a terminal they fit it, and a bar tells the rest.

    Elsewhere, such as in a file, a line stays one line and there is no bar.
    """

    def __init__(self, active: bool, now: Callable[[], float] = time.monotonic):
        """Prints only if active, as process 0 is; `now` is a clock in seconds."""
        self._active = active
        self._now = now
        is_terminal = active and sys.stdout is not None and sys.stdout.isatty()
        self._has_bar = is_terminal and os.environ.get("TERM", "dumb") != "dumb"
        self._bar = ""
        self._drawn = -_DRAW_EVERY_S
        self._begun: tuple[float, int] | None = None  # when, after which step
        self._opened = False  # by a line of the run
        self.note = ""  # beside the bar

    def say(self, line: str) -> None:
        """Prints a line; on a terminal, as many as it takes there."""
        if not self._active:
            return
        self._opened = True
        if self._has_bar:
            self._write(_CLEAR + fitted(line, _width()) + "\n" + self._bar)
        else:
            say(line)

    def phase(self, kind: str) -> None:
        """Tells that a kind of `Goodput` begins, if that is one that lasts."""
        text = _PHASES.get(kind)
        if text is None or not self._active:
            return
        if self._has_bar:
            self._show(text)
        elif kind == "compile" and self._opened:  # before it, only small things are
            self.say(text)

    def progress(self, step: int, steps: int) -> None:
        """Draws the bar after a step, with the time that the rest will take."""
        if not self._has_bar:
            return
        now = self._now()
        if self._begun is None:
            self._begun = now, step
            return
        if now - self._drawn < _DRAW_EVERY_S:
            return
        self._drawn = now
        began, first = self._begun
        left_s = (now - began) / max(step - first, 1) * (steps - step)
        self._show(progress_line(step, steps, left_s, self.note, _width()))

    def close(self) -> None:
        """Removes the bar."""
        if self._has_bar and self._bar:
            self._show("")

    def _show(self, text: str) -> None:
        self._bar = text[: _width() - 1]
        self._write(_CLEAR + self._bar)

    def _write(self, text: str) -> None:
        # A terminal that is gone must not end the run.
        with contextlib.suppress(OSError):
            sys.stdout.write(text)
            sys.stdout.flush()


def duration(seconds: float) -> str:
    """Returns a time for people: 0m07s, 12m05s, 3h07m or 2d04h."""
    minutes, rest_s = divmod(int(max(seconds, 0.0)), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes_left:02d}m" if hours else f"{minutes}m{rest_s:02d}s"


def progress_line(step: int, steps: int, left_s: float, note: str, width: int) -> str:
    """A line of less than `width` characters; the note goes first where it is narrow.

    Args:
      step: steps done.
      steps: of the run.
      left_s: seconds until its end.
      note: what else to say.
      width: characters of the terminal.
    """
    share = step / max(steps, 1)
    ends = [f"  {note}"] if note else []
    for end in [*ends, ""]:
        head, tail = f"{step}/{steps} ", f" {share:.0%}{end}  {duration(left_s)} left"
        room = min(width - len(head) - len(tail) - 3, _BAR)
        if room >= 5:
            done = int(share * room)
            return f"{head}[{'=' * done}{' ' * (room - done)}]{tail}"
    return f"{head}{tail.strip()}"[: width - 1]


def fitted(line: str, width: int) -> str:
    """The line cut at its double spaces, else at words, to fit; the rest indented.

    A command stays one line, so that it can be copied, and a quoted text keeps all its
    spaces.
    """
    if len(line) < width or line.startswith(COMMAND):
        return line
    rows: list[str] = []
    is_a_text = "'" in line or '"' in line  # whose spaces are its own
    for part in [line] if is_a_text else line.split("  "):
        if rows and len(rows[-1]) + 2 + len(part) < width:
            rows[-1] += f"  {part}"
        else:
            rows.append(f"  {part}" if rows else part)
    return "\n".join(
        textwrap.fill(
            row,
            max(width - 1, 20),
            subsequent_indent="    ",
            drop_whitespace=not is_a_text,
        )
        for row in rows
    )


def _width() -> int:
    return max(shutil.get_terminal_size().columns, 20)
