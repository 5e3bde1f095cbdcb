"""The step after which all processes stop, once any of them is told to (SIGTERM).

When the word spreads they are not all at the same step, and one that stopped before
another took its next step would leave that one waiting in a collective for ever. So
each says how far it has come, and goes no further until it hears what was the farthest.
"""

import sys
import threading
from collections.abc import Callable
from types import FrameType


class LastStep:
    """As one process knows it; `hub.Hub` is who asks all and tells the farthest."""

    def __init__(self, tell: Callable[[], None] | None = None):
        """Of a process alone, or of one that is to `tell` the others of a SIGTERM."""
        self._tell = tell
        self._lock = threading.Lock()
        self._asked = False  # how far this process has come
        self._begun = -1  # after how many steps the newest began
        self._last = sys.maxsize
        self._told = threading.Event()

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """A handler of Python's: it may interrupt any line of the main thread."""
        del number, frame
        if self._tell is None:
            self._last = 0
        else:
            self._tell()

    def ask(self) -> int:
        """After how many steps the newest began; it waits for `tell` from now on."""
        with self._lock:
            self._asked = True
            return self._begun

    def tell(self, step: int) -> None:
        """All are to stop after `step` steps."""
        self._last = step
        self._told.set()

    def reached(self, done: int) -> bool:
        """Whether to stop after `done` steps; if not, the next one is to begin."""
        with self._lock:
            asked = self._asked
            if not asked:
                self._begun = done
        if asked:
            self._told.wait()
        return done >= self._last
