"""The log of the steps: waits for each of them one step late, and records it.

Reading a metric waits for its step. One step late, the devices have the next one to
work on meanwhile. A record is of one step, a line for people the mean since the last.
"""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from mtp_jax.config import Config
from mtp_jax.distributed import hosts
from mtp_jax.errors import RunFailed
from mtp_jax.run.goodput import Goodput, straggler
from mtp_jax.run.records import (
    mean_of_steps,
    step_line,
    step_record,
    straggler_line,
)
from mtp_jax.run.run_file import RunFile
from mtp_jax.run.run_log import RunLog
from mtp_jax.run.stopwatch import Stopwatch


class StepLog:
    """Writes metrics on schedule, and stops a run whose steps are not finite."""

    def __init__(
        self,
        cfg: Config,
        start: int,
        *,
        log: RunLog,
        run_file: RunFile,
        goodput: Goodput,
    ):
        """Begins after step `start`."""
        self._cfg = cfg
        self._first = start + 1
        self._log = log
        self._run_file = run_file
        self._goodput = goodput
        self._stopwatch = Stopwatch()
        self._unread: tuple[int, dict[str, jax.Array]] | None = None
        self._since_line: list[dict[str, jax.Array]] = []
        self._window_end = -1  # the step at which the last window ended

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        with self._stopwatch.waiting_for_data(), self._goodput.spent("data"):
            yield

    def begun(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that has begun; waits for the one before.

        Raises:
          RunFailed: too many non-finite steps in a row.
        """
        self.catch_up()
        self._unread = step, metrics
        if step == self._first:
            self._stopwatch.restart()  # that one was compiled first

    def catch_up(self) -> None:
        """Waits for the last step that has begun, if it was not waited for yet.

        Raises:
          RunFailed: too many non-finite steps in a row.
        """
        if self._unread is None:
            return
        (step, metrics), self._unread = self._unread, None
        with self._stopwatch.waiting_for_step():
            bad = int(metrics["bad_steps"])
        if bad >= self._cfg.train.max_bad_steps:
            raise RunFailed(
                f"the loss or its gradient was not finite for {bad} steps in a row up "
                f"to step {step}; they were skipped and not saved. Try a lower "
                "config.optim.peak_lr, or look at the data of those steps."
            )
        self._log.screen.progress(step, self._cfg.train.steps)
        self._since_line.append(metrics)
        if step % self._cfg.log.every == 0 or bad:
            self._write(step, jax.device_get(self._since_line))
            self._since_line.clear()

    def restart(self) -> None:
        """Goes on after something other than steps, whose time is not of a step."""
        self._run_file.write_sometimes()
        self._stopwatch.restart()

    def _write(self, step: int, metrics: list[dict[str, np.ndarray]]) -> None:
        """Writes a record of metrics.jsonl and a line for people.

        Args:
          step: the last one.
          metrics: of every step since the last line.
        """
        window = self._stopwatch.read()
        record = step_record(self._cfg, step, metrics[-1], window)
        slow = straggler(hosts.reports(), self._window_end, window.step_s)
        hosts.report(step=step, own_s=window.own_s, data_s=window.data_s)
        self._window_end = step
        if slow is not None:
            record |= {"slowest_host": slow[0], "slowest_host_s": slow[1]["own_s"]}
        share = self._goodput.share()
        record |= {"goodput": round(share, 4), "time": round(time.time(), 3)}
        self._log.screen.note = f"loss {record['loss/head_1']:.3f}"
        self._log.write("metrics.jsonl", record)
        mean = mean_of_steps(metrics)
        self._log.say(step_line(self._cfg, record, mean, share))
        if slow is not None:
            self._log.say(straggler_line(hosts.name_of(slow[0]), slow[1]))
        self._run_file.write_sometimes()
