"""Which durable checkpoints are kept: the latest, some regularly, and the best."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import v1 as ocp

from mtp_jax.config import CheckpointConfig

_POLICIES = ocp.training.preservation_policies
HELDOUT_LOSS = "heldout_loss"  # the metric that keep_best compares, smaller is better


def retention(cfg: CheckpointConfig, measured: dict[int, float]) -> Any:
    """Orbax's policy of which checkpoints to keep.

    Args:
      cfg: how many of which kind.
      measured: by step, held-out losses that were not yet known at the save; read at
        every decision.
    """
    policies: list[Any] = [_POLICIES.LatestN(cfg.keep_latest)]
    if cfg.keep_every:
        policies.append(_POLICIES.EveryNSteps(cfg.keep_every))
    if cfg.keep_best:
        policies.append(_Best(cfg.keep_best, measured))
    return _POLICIES.AnyPreservationPolicy(policies)


@dataclasses.dataclass
class _Best:
    """Keeps the n of the lowest held-out loss; a loss that is not finite is none."""

    n: int
    measured: dict[int, float]

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        """One answer a checkpoint, as Orbax asks for them."""
        losses = {
            c.step: loss for c in checkpoints if (loss := self._loss(c)) is not None
        }
        best = sorted(losses, key=lambda step: losses[step])[: self.n]
        return [c.step in best for c in checkpoints]

    def _loss(self, checkpoint: Any) -> float | None:
        saved = (checkpoint.metrics or {}).get(HELDOUT_LOSS)
        loss = self.measured.get(checkpoint.step, saved)
        return loss if loss is not None and math.isfinite(loss) else None
