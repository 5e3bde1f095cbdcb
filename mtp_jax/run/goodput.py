"""Where the wall time of a run went, from its first start on, all restarts included.

A run is always in one of KINDS. What was spent after the checkpoint that a restart goes
on from, and the time until it does, is lost. Counted in process 0, which waits for the
others as they do for it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

KINDS = ("step", "compile", "data", "save", "restore", "evaluate", "start", "lost")
_LOADED = time.time()  # this process began not long before


class Goodput:
    """Wall time in seconds by kind; the clock always runs for one of them."""

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        began: float = _LOADED,
        tell: Callable[[str], None] = lambda kind: None,
    ):
        """Begins in "start", at the Unix time `began`; `tell` hears of other kinds."""
        self._now = now
        self._tell = tell
        self._kind = "start"
        self._began = began
        self._since = began
        self._seconds = dict.fromkeys(KINDS, 0.0)

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts what happens inside as `kind`, and not as what is around it."""
        before = self._switch(kind)
        try:
            self._tell(kind)
            yield
        finally:
            self._switch(before)

    def now_in(self, kind: str) -> None:
        """Counts what follows as `kind`."""
        self._switch(kind)

    def go_on(self, saved: dict[str, float], last: dict[str, Any] | None) -> None:
        """Takes over from the run before, at a restart.

        Args:
          saved: `seconds` when the checkpoint was saved that this run goes on from;
            empty if it begins again.
          last: `state` as the run before wrote it last, None if there was none.
        """
        if last is None:
            return
        kept = {kind: float(saved.get(kind, 0.0)) for kind in KINDS}
        if last["finished"]:  # to train longer than was first meant; nothing was lost
            kept, gap = {kind: float(last["seconds"][kind]) for kind in KINDS}, 0.0
        else:
            wasted = sum(last["seconds"].values()) - sum(kept.values())
            gap = max(wasted, 0.0) + max(self._began - last["at"], 0.0)
        for kind in KINDS:
            self._seconds[kind] += kept[kind]
        self._seconds["lost"] += gap

    def seconds(self) -> dict[str, float]:
        """Seconds of every kind, up to now."""
        self._switch(self._kind)
        return {kind: round(s, 3) for kind, s in self._seconds.items()}

    def share(self) -> float:
        """The share of all time that was spent in steps, 0 to 1."""
        seconds = self.seconds()
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def state(self, finished: bool = False) -> dict[str, Any]:
        """The entry of run.json: seconds, shares, and the Unix time of this call."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        return {
            "seconds": seconds,
            "shares": {kind: round(s / total, 4) for kind, s in seconds.items()},
            "at": self._since,
            "finished": finished,
        }

    def _switch(self, kind: str) -> str:
        """Ends the present kind and begins another; returns the one that ended."""
        now = self._now()
        self._seconds[self._kind] += max(now - self._since, 0.0)
        before, self._kind, self._since = self._kind, kind, now
        return before


def straggler(
    windows: dict[int, dict[str, Any]], step: int, step_s: float
) -> tuple[int, dict[str, Any]] | None:
    """The host whose own work takes longest in a step, if it stands out.

    Args:
      windows: by host, from its last report: `step` at the end of its window, `own_s`
        and `data_s`, seconds a step that it did not wait for devices, and of those
        that it waited for data.
      step: windows that end at another one are not compared.
      step_s: seconds a step of the whole run.

    Returns:
      (host, its window), or None: the hosts are alike, or not all have reported. A
      host stands out with half as much again as the median of the others, and more
      than a tenth of a step above it.
    """
    if len(windows) < 2 or any(w.get("step") != step for w in windows.values()):
        return None
    slowest = max(windows, key=lambda i: windows[i]["own_s"])
    others = sorted(w["own_s"] for i, w in windows.items() if i != slowest)
    median = others[len(others) // 2]
    own = windows[slowest]["own_s"]
    stands_out = own > 1.5 * median and own - median > 0.1 * step_s
    return (slowest, windows[slowest]) if stands_out else None
