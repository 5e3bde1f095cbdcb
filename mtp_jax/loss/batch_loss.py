"""The training loss of a batch of packed rows: embeddings, trunk, heads, sums.

Axes: B batch, S = T + N tokens of a row, T positions, N heads, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import ComputeConfig
from mtp_jax.loss.head_loss import head_loss
from mtp_jax.loss.metrics import HeadSums, sums_over_targets
from mtp_jax.loss.targets import Targets, future_targets
from mtp_jax.model.attention import RowContext, attend_within
from mtp_jax.model.language_model import LanguageModel, run_trunk
from mtp_jax.parallel.sequence import split_time


def batch_loss(
    model: LanguageModel,
    batch: dict[str, jax.Array],
    weight_N: jax.Array,
    z_loss: float,
    compute: ComputeConfig,
    few_documents: bool = False,
) -> tuple[jax.Array, HeadSums]:
    """The training loss of packed rows, and the sums and counts of every head.

    loss = sum over heads and targets of weight (nll + z_loss log_z^2), float32.

    Args:
      model: with n heads.
      batch: tokens, segments and positions, int32 [B, S]: token ids, document numbers
        with 0 for padding, and positions within the documents.
      weight_N: weight of each target of a head, float32.
      z_loss: weight of the squared log-partition.
      compute: how the arithmetic is carried out.
      few_documents: True if `attention.few_documents` holds for the rows.
    """
    n = model.cfg.n_future_tokens
    # Every device has its rows whole, and so whatever its positions must predict.
    token_NBT, valid_NBT = map(
        split_time, future_targets(batch["tokens"], batch["segments"], n)
    )
    tokens_BT = split_time(batch["tokens"][:, :-n])
    positions_BT = split_time(batch["positions"][:, :-n])
    rows = RowContext(
        model.angles(positions_BT), batch["segments"][:, :-n], few_documents
    )
    trunk_BTD = run_trunk(
        model,
        model.embed(tokens_BT),
        rows.angles_BTk,
        attend_within(rows, compute.attention),
        compute.remat,
        compute.scan_layers,
    )
    targets = Targets(token_NBT, jnp.where(valid_NBT, weight_N[:, None, None], 0.0))
    loss, scores = head_loss(model, trunk_BTD, rows, targets, z_loss, compute)
    return loss, sums_over_targets(scores, token_NBT, valid_NBT)


def head_sums(
    model: LanguageModel, batch: dict[str, jax.Array], compute: ComputeConfig
) -> HeadSums:
    """Sums and counts of every head over a batch, as of `batch_loss`."""
    unweighted_N = jnp.zeros(model.cfg.n_future_tokens)
    return batch_loss(model, batch, unweighted_N, 0.0, compute)[1]
