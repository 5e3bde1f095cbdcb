"""A run as Weights & Biases has it, online or in a folder (WANDB_MODE=offline)."""

import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from mtp_jax.config import Config, as_tree
from mtp_jax.errors import UserError, warn
from mtp_jax.storage import is_remote, write_atomically

_FINISH_S = 30.0  # for what is still to be sent at the end


class WandbRun:
    """One run for all starts of a workdir: its id is kept there.

    Scalars have `step` as their horizontal axis, and not the library's own count, which
    never goes back: a run that restarts from a checkpoint does the same steps again.
    """

    def __init__(self, cfg: Config, workdir: epath.Path):
        """Begins the run, or goes on with it.

        Raises:
          UserError: the library refuses, as without an account.
        """
        import wandb  # half a second

        folder = workdir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(
                project=cfg.log.wandb,
                id=_id_of(folder),
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


def _id_of(folder: epath.Path) -> str:
    """The id of the run in a folder, a new one if it has none."""
    path = folder / "id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12])
    return path.read_text().strip()
