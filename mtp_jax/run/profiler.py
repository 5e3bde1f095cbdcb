"""A profiler trace of a few steps, at the step that the config names."""

import jax
from etils import epath

from mtp_jax.config import LogConfig


class Profiler:
    """Traces `profile_steps` steps from step `profile_step` on; 0: none."""

    def __init__(self, cfg: LogConfig, workdir: epath.Path):
        self._folder = workdir / "profile"
        self._first = cfg.profile_step
        self._end = cfg.profile_step + cfg.profile_steps
        self._tracing = False

    def before_step(self, step: int) -> None:
        """Begins or ends the trace, if it is to begin or end before this step."""
        if self._first and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif step >= self._end:
            self.stop()

    def stop(self) -> None:
        """Writes the trace that was begun, if any."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
