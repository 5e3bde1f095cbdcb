"""Wall time of steps, and how much of it a host waited: for data, for its devices."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Window:
    """Means over the steps between two lines of the log, in seconds a step."""

    step_s: float
    data_s: float  # of it, waiting for data
    own_s: float  # of it, not waiting for devices: the work of this host


class Stopwatch:
    """Wall time of the steps since the last reading, and what was waited for."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forgets what passed, such as an evaluation between two steps."""
        self._begin, self._steps = time.perf_counter(), 0
        self._data_s = self._devices_s = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self._data_s += time.perf_counter() - began

    @contextlib.contextmanager
    def waiting_for_step(self) -> Iterator[None]:
        """Counts a step, and the time inside as waiting for the devices to end it."""
        began = time.perf_counter()
        yield
        self._steps += 1
        self._devices_s += time.perf_counter() - began

    def read(self) -> Window:
        """The window up to now; begins anew."""
        passed, steps = time.perf_counter() - self._begin, max(self._steps, 1)
        own_s = (passed - self._devices_s) / steps
        result = Window(passed / steps, self._data_s / steps, own_s)
        self.restart()
        return result
