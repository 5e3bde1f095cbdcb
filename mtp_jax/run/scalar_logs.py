"""Where the numbers of a run's records also go: TensorBoard, Weights & Biases."""

import importlib.util
from collections.abc import Mapping
from typing import Protocol

from etils import epath

from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.run.tensorboard import TensorBoardFile
from mtp_jax.run.weights_and_biases import WandbRun


class ScalarLog(Protocol):
    """Takes the numbers of records, by their names."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes those of a step; steps may come again after a restart."""
        ...

    def close(self, failed: bool) -> None:
        """Writes what is left, of a run that failed or not."""
        ...


def check_scalar_logs(cfg: Config) -> None:
    """Refuses a log that cannot be written, before anything is compiled.

    Raises:
      UserError: the package of Weights & Biases is asked for and not there.
    """
    there = importlib.util.find_spec("wandb") if cfg.log.wandb else None
    # A folder of that name, as the package itself leaves, would do without an origin.
    if cfg.log.wandb and (there is None or there.origin is None):
        raise UserError(
            f"config.log.wandb is {cfg.log.wandb}, which needs the package wandb; run "
            "pip install 'mtp-jax[wandb]', or leave it empty."
        )


def scalar_logs(cfg: Config, workdir: epath.Path, step: int) -> list[ScalarLog]:
    """The logs that a config asks for, open; of one process of a run.

    Args:
      cfg: of the run.
      workdir: of the run.
      step: from which the run goes on; what is there of later steps comes again.

    Raises:
      UserError: Weights & Biases refuses the run.
    """
    made: list[ScalarLog] = []
    if cfg.log.tensorboard:
        made.append(TensorBoardFile(workdir / "tensorboard", step))
    if cfg.log.wandb:
        made.append(WandbRun(cfg, workdir))
    return made
