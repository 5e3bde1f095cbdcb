"""A run as Weights & Biases has it, online or in a folder (WANDB_MODE=offline)."""

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mtp_jax.config import Config, as_tree
from mtp_jax.errors import UserError, warn
from mtp_jax.storage import absolute, is_remote, write_atomically

_FINISH_S = 30.0  # for what is still to be sent at the end


class WandbRun:
    """One run for all starts of a workdir, whose id is kept there.

    Scalars have `step` as their horizontal axis, and not the library's own count, which
    never goes back: a run that restarts from a checkpoint does the same steps again.
    """

    def __init__(self, cfg: Config, workdir: epath.Path):
        """Begins the run, or goes on with it.

        Raises:
          UserError: the library refuses, as without an account.
        """
        import wandb  # half a second

        try:
            with _no_questions():
                self._run: Any = wandb.init(
                    project=cfg.log.wandb,
                    id=_id_of(workdir),
                    name=workdir.name,
                    dir=None if is_remote(workdir) else str(workdir),
                    config=as_tree(cfg),
                    allow_val_change=True,
                    resume="allow",
                    settings={
                        "silent": True,
                        "console": "off",
                        "finish_timeout": _FINISH_S,
                    },
                )  # None once it is lost
        except wandb.Error as error:
            reason = str(error).strip().splitlines()
            raise UserError(
                f"config.log.wandb is {cfg.log.wandb}, and Weights & Biases says: "
                f"{reason[0] if reason else type(error).__name__} (run wandb login, "
                "or set WANDB_MODE=offline)"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs scalars of a step, by their names."""
        self._try("log", {"step": step, **scalars})

    def close(self, failed: bool) -> None:
        """Ends this start of the run, and sends what is left, for a while."""
        self._try("finish", exit_code=int(failed))

    def _try(self, method: str, *args: Any, **options: Any) -> None:
        """Calls a method of the run; a training does not end because one fails."""
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*args, **options)
        except Exception as error:
            warn(f"mtp-jax: Weights & Biases gets no more of this run: {error}")
            self._run = None


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Hides the terminal or notebook, of which the library would ask an account."""
    stdin, terminal = sys.stdin, os.environ.get("TERM")
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        os.environ["TERM"] = "dumb"  # a notebook has no stdin, and asks all the same
        try:
            yield
        finally:
            sys.stdin = stdin
            os.environ.pop("TERM")
            if terminal is not None:
                os.environ["TERM"] = terminal


def _id_of(workdir: epath.Path) -> str:
    """The id of a workdir's run, a new one if it has none or is a copy of another."""
    path, here = workdir / "wandb" / "id", str(absolute(workdir))
    kept = path.read_text() if path.exists() else ""
    made, _, there = kept.partition("\n")
    # Two workdirs with one id would write into each other's curves.
    if not made or there not in ("", here):
        made = uuid.uuid4().hex[:12]
    if kept != f"{made}\n{here}":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{made}\n{here}")
    return made
