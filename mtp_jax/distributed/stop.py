"""The step after which all processes stop, once any of them is told to.

When the word spreads they are not all at the same step, and one that stopped before
another took its next step would leave that one waiting in a collective for ever. So
each reports its step, and goes no further until it hears which one was the farthest.
"""

import sys
import threading

NOTHING_BEGUN = "told to stop before a step: there is nothing new to save"


class LastStep:
    """The last step of a run, as one process knows it.

    The coordinator asks all processes for their steps, and tells the farthest.
    """

    def __init__(self) -> None:
        """Starts before the first step, without a last one."""
        self._lock = threading.Lock()
        self._asked = False  # has said its step, and waits
        self._begun = -1  # after how many steps the newest began
        self._last = sys.maxsize
        self._told = threading.Event()

    def ask(self) -> int:
        """Returns the steps before the newest, or -1; from now on waits for `tell`."""
        with self._lock:
            self._asked = True
            return self._begun

    def tell(self, last: int) -> None:
        """Sets the number of steps after which all are to stop."""
        self._last = last
        self._told.set()

    def has_begun(self) -> bool:
        """Returns True if a step has begun."""
        with self._lock:
            return self._begun >= 0

    def stop_alone(self) -> bool:
        """Stops a process without others; returns False if it has begun no step."""
        with self._lock:
            self._last = 0
            return self._begun >= 0

    def reached(self, done: int) -> bool:
        """Returns True if the run stops after `done` steps; else begins the next."""
        with self._lock:
            asked = self._asked
            if not asked:
                self._begun = done
        if asked:
            self._told.wait()
        return done >= self._last
