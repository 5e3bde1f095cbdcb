"""How often each head is right, by how far into a document it looks ahead.

Axes: N heads, K bins of positions, B rows, T positions of a row, S = T + N tokens.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.checkpoint.restore import Restored, as_restored
from mtp_jax.config import ComputeConfig, ModelConfig
from mtp_jax.data.batches import open_sources
from mtp_jax.errors import UserError
from mtp_jax.eval.heldout import placed_heldout
from mtp_jax.loss.batch_loss import head_hits
from mtp_jax.model.language_model import model_builder

_BINS = 32
_TOKENS = 1 << 16  # positions that are measured, about


@dataclasses.dataclass(frozen=True)
class PositionAccuracy:
    """Right predictions and targets, by head and position in the document."""

    starts: np.ndarray  # int [K], the first position of each bin
    last: int  # the last position of the last bin
    correct_NK: np.ndarray  # float64
    count_NK: np.ndarray  # float64

    @property
    def accuracy_NK(self) -> np.ndarray:
        """The share of targets that were the most likely token; NaN without any."""
        with np.errstate(invalid="ignore"):
            return self.correct_NK / self.count_NK

    @property
    def accuracy_N(self) -> np.ndarray:
        """The share over all positions, as `evaluate` has it."""
        return self.correct_NK.sum(1) / np.maximum(self.count_NK.sum(1), 1)


def accuracy_by_position(
    model: Restored | str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]] | None = None,
    bins: int = _BINS,
    max_batches: int | None = None,
) -> PositionAccuracy:
    """Measures every head on held-out text, by the position that it predicts from.

    Positions count from 0 at the begin of a document, or where a row begins within one:
    so many tokens the model has read before. Teacher-forced.

    Args:
      model: a restored model, or the workdir of a run.
      data: folders of prepared corpora; None for those of the run.
      bins: of positions, of equal width; at most as many as there are positions.
      max_batches: measure only so many batches, evenly spread; None for as many as have
        about 65,536 positions.

    Raises:
      UserError: no such run or corpus, a corpus of another tokenizer, no held-out text.
    """
    restored = as_restored(model)
    cfg = restored.config
    sources = open_sources(
        cfg,
        None if data is None else [os.fspath(name) for name in data],
        splits=["heldout"],
        tokenizer=restored.tokenizer.fingerprint,
    )
    t = cfg.data.seq_len
    if max_batches is None:
        rows = cfg.data.batch_size // cfg.train.accumulation
        max_batches = max(1, _TOKENS // (rows * t))
    bins = min(bins, t)
    starts = np.array([-(-k * t // bins) for k in range(bins)])
    with jax.set_mesh(restored.mesh):
        sums_of = _program(cfg.model, tuple(starts.tolist()))
        total_2NK = np.zeros((2, cfg.model.n_future_tokens, bins))
        for batch in placed_heldout(cfg, sources, restored.mesh, max_batches):
            total_2NK += jax.device_get(sums_of(restored.params, batch))
    if not total_2NK[1].any():
        raise UserError("there are no held-out rows to measure.")
    return PositionAccuracy(starts, t - 1, total_2NK[0], total_2NK[1])


def _program(cfg: ModelConfig, starts: tuple[int, ...]) -> Callable[..., Any]:
    """`f(params, batch)`, jitted: right predictions and targets, float32 [2, N, K]."""
    _, build = model_builder(cfg)

    @jax.jit
    def program(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        batch = {name: x_1BS[0] for name, x_1BS in batch.items()}
        hit_NBT, valid_NBT = head_hits(build(params), batch, ComputeConfig())
        positions_BT = batch["positions"][:, : -cfg.n_future_tokens]
        bin_BT = sum(
            (positions_BT >= start).astype(jnp.int32) for start in starts[1:]
        ) + jnp.zeros_like(positions_BT)

        def of_bin(k: jax.Array) -> jax.Array:
            inside_NBT = valid_NBT & (bin_BT == k)[None]
            both = [
                jnp.sum(x_NBT, axis=(1, 2), dtype=jnp.float32)
                for x_NBT in (inside_NBT & hit_NBT, inside_NBT)
            ]
            return jnp.stack(both)

        sums_K2N = jax.lax.map(of_bin, jnp.arange(len(starts)))
        return jnp.moveaxis(sums_K2N, 0, -1)

    return program
