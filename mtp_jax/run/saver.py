"""Checkpoints of a run: when one is due, what goes into it, and where it goes."""

from collections.abc import Callable
from typing import Any

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.checkpoint.local import LocalCheckpoints
from mtp_jax.config import Config, config_to_json
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.tokenizer import tokenizer_identity
from mtp_jax.errors import warn
from mtp_jax.run.goodput import Goodput
from mtp_jax.run.run_log import RunLog
from mtp_jax.training.train_step import TrainState


class Saver:
    """Saves durable checkpoints on schedule, and fast local ones between them."""

    def __init__(
        self,
        cfg: Config,
        corpora: list[Corpus],
        *,
        rows_at: Callable[[int], int],
        durable: Checkpoints,
        local: LocalCheckpoints | None,
        log: RunLog,
        goodput: Goodput,
    ):
        """`rows_at` gives the rows that are consumed after a step."""
        self._cfg = cfg
        self._corpora = corpora
        self._rows_at = rows_at
        self._durable = durable
        self._local = local
        self._log = log
        self._goodput = goodput

    def due(self, step: int, stopping: bool) -> bool:
        """Returns True if `save` has something to do after this step."""
        return self._durable_due(step, stopping) or self._local_due(step)

    def save(
        self, state: TrainState, step: int, stopping: bool, heldout_loss: float | None
    ) -> None:
        """Begins to save what is due; returns once the arrays are off the devices.

        Args:
          state: after `step`.
          step: steps done.
          stopping: the run ends after this step, so it is saved in any case.
          heldout_loss: of head 1, in nats, if it was just measured.

        Raises:
          UserError: there is no room on the disk for a durable checkpoint.
        """
        if self._durable_due(step, stopping):
            self._log.sync()  # a resume needs the lines up to its step
            with self._goodput.spent("save"):
                self._durable.save(step, state, self._metadata(step), heldout_loss)
        elif self._local_due(step):
            self._save_locally(state, step)

    def wait(self) -> None:
        """Waits until the last durable checkpoint is on disk."""
        with self._goodput.spent("save"):
            self._durable.wait()

    def _durable_due(self, step: int, stopping: bool) -> bool:
        every, last = self._cfg.checkpoint.every, self._cfg.train.steps
        return step % every == 0 or step == last or stopping

    def _local_due(self, step: int) -> bool:
        return self._local is not None and self._local.due(step)

    def _save_locally(self, state: TrainState, step: int) -> None:
        """Saves on the disk of this host; one that is full ends these, not the run."""
        assert self._local is not None
        try:
            with self._goodput.spent("save"):
                about = {**self._goodput.seconds(), "rows": self._rows_at(step)}
                self._local.save(step, state, about)
        except OSError as error:
            warn(
                f"mtp-jax: no more local checkpoints: {error.strerror} in "
                f"config.checkpoint.local_dir ({self._cfg.checkpoint.local_dir})"
            )
            self._local = None

    def _metadata(self, step: int) -> dict[str, Any]:
        """The facts about the run that a durable checkpoint holds as JSON."""
        splits = [corpus.manifest["splits"]["train"] for corpus in self._corpora]
        return {
            "config": config_to_json(self._cfg),
            "data": {"batches": step, "rows": self._rows_at(step), "corpora": splits},
            "tokenizer": tokenizer_identity(self._corpora[0].tokenizer),
            "seconds": self._goodput.seconds(),
        }
