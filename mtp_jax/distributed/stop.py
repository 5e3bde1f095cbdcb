"""The step after which all processes stop, once any of them is told to (SIGTERM).

When the word spreads they are not all at the same step, and one that stopped before
another took its next step would leave that one waiting in a collective for ever. So
each reports its step, and goes no further until it hears which one was the farthest.
"""

import signal
import socket
import sys
import threading
from collections.abc import Callable

NOTHING_BEGUN = "told to stop before a step: there is nothing new to save"


def on_sigterm(act: Callable[[], None]) -> None:
    """Has SIGTERM call `act` in a thread, whatever the main thread is blocked in.

    A handler of Python's waits for the main thread, which may compile for minutes. A
    byte in a socket does not; but the event loops of libraries may take that over for a
    while, so the handler sends one as well.
    """
    here, there = socket.socketpair()
    there.setblocking(False)

    def listen() -> None:
        while True:
            if signal.SIGTERM in here.recv(64):
                act()

    threading.Thread(target=listen, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda number, frame: there.send(bytes([number])))
    signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)


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
