"""The training loss of a batch of packed rows: embeddings, trunk, heads, sums.

Axes: B batch, S = T + N tokens of a row, T positions, N heads, D width, V vocabulary,
J extra targets.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import ComputeConfig, LossConfig
from mtp_jax.loss.cross_entropy import TokenScores
from mtp_jax.loss.head_loss import head_loss
from mtp_jax.loss.metrics import HeadSums, sums_over_targets
from mtp_jax.loss.scored import teacher_of
from mtp_jax.loss.targets import Targets, extra_targets, future_targets
from mtp_jax.loss.weights import StepWeights
from mtp_jax.model.attention import RowContext
from mtp_jax.model.language_model import LanguageModel, run_trunk
from mtp_jax.parallel import zigzag
from mtp_jax.parallel.sequence import split_time
from mtp_jax.parallel.sharding import time_parts


def batch_loss(
    model: LanguageModel,
    batch: dict[str, jax.Array],
    weights: StepWeights,
    loss: LossConfig,
    compute: ComputeConfig,
    few_documents: bool = False,
    teacher: LanguageModel | None = None,
) -> tuple[jax.Array, HeadSums]:
    """The training loss of packed rows, and the sums and counts of every head.

    Args:
      model: with n heads.
      batch: tokens, segments and positions, int32 [B, S]: token ids, document numbers
        with 0 for padding, and positions within the documents; learned, if there, is 1
        for the tokens that count as targets, 0 for those that are only read.
      weights: of this step, of each target of a head.
      loss: what the heads are taught, in the terms of `head_loss`.
      compute: how the arithmetic is carried out.
      few_documents: True if `attention.few_documents` holds for the rows.
      teacher: the model whose head 1 teaches; None for the model itself.
    """
    total, scores, token_NBT, valid_NBT = _scored(
        model, batch, weights, loss, compute, few_documents, teacher
    )
    return total, sums_over_targets(scores, token_NBT, valid_NBT, weights.active_N)


def _scored(
    model: LanguageModel,
    batch: dict[str, jax.Array],
    weights: StepWeights,
    loss: LossConfig,
    compute: ComputeConfig,
    few_documents: bool = False,
    teacher: LanguageModel | None = None,
) -> tuple[jax.Array, TokenScores, jax.Array, jax.Array]:
    """The loss of `batch_loss`, scores, and the targets that they are of, [N, B, T]."""
    n = model.cfg.n_future_tokens
    # Every device has its rows whole, and so whatever its positions must predict.
    token_NBT, valid_NBT = map(
        split_time,
        future_targets(batch["tokens"], batch["segments"], n, batch.get("learned")),
    )
    tokens_BT = split_time(batch["tokens"][:, :-n])
    positions_BT = split_time(batch["positions"][:, :-n])

    def run(model):
        rows = RowContext(
            model.angles(positions_BT), batch["segments"][:, :-n], few_documents
        )
        return rows, run_trunk(
            model,
            model.embed(tokens_BT),
            rows,
            compute.attention,
            compute.remat,
            compute.scan_layers,
        )

    rows, trunk_BTD = run(model)
    targets = targets_of(token_NBT, valid_NBT, batch, weights, loss)
    of_other = None
    if teacher is not None:
        other_rows, other_BTD = run(teacher)
        of_other = teacher_of(teacher, other_BTD, other_rows, compute)
    total, scores = head_loss(model, trunk_BTD, rows, targets, loss, compute, of_other)
    return total, scores, token_NBT, valid_NBT


def targets_of(
    token_NBT: jax.Array,
    valid_NBT: jax.Array,
    batch: dict[str, jax.Array],
    weights: StepWeights,
    loss: LossConfig,
) -> Targets:
    """The targets of a batch, and by what they are weighed at this step.

    Args:
      token_NBT, valid_NBT: from `future_targets`, their time split over devices.
      batch, weights, loss: as for `batch_loss`.
    """
    n, _, t = token_NBT.shape
    weight_NBT = jnp.where(valid_NBT, weights.weight_N[:, None, None], 0.0)
    soft_NBT = None
    if loss.kind != "hard":
        first_N = jnp.arange(n) == 0
        mix_N = jnp.where(first_N, 0.0, loss.soft_mix)[:, None, None]
        soft_NBT = weight_NBT * mix_N * _heard(valid_NBT, loss.kind == "e2e")
        weight_NBT = weight_NBT * (1.0 - mix_N)
    extra = extra_weight = None
    if weights.extra_J is not None:
        tokens_BS, segments_BS = batch["tokens"], batch["segments"]
        count = len(weights.extra_J)
        learned_BS = batch.get("learned")
        extra, valid = extra_targets(tokens_BS, segments_BS, t, count, learned_BS)
        extra, valid = (_split_each(x_BTJ)[None] for x_BTJ in (extra, valid))
        extra_weight = jnp.where(valid, weights.extra_J[None, None, None], 0.0)
    return Targets(
        token_NBT,
        weight_NBT,
        soft_NBT=soft_NBT,
        z_N=jnp.array(loss.head_z_loss, jnp.float32) if loss.head_z_loss else None,
        extra_NBTJ=extra,
        extra_weight_NBTJ=extra_weight,
        pull_N=weights.pull_N,
        table_N=(
            (jnp.arange(n) == 0).astype(jnp.float32)
            if loss.unembedding_gradient == "first"
            else None
        ),
        active_N=weights.active_N,
        number_N=(
            None
            if loss.plain and not loss.measures_gradients
            else jnp.arange(n, dtype=jnp.int32)
        ),
    )


def _split_each(x_BTJ: jax.Array) -> jax.Array:
    """`split_time` of each of the last axis."""
    split_JBT = split_time(jnp.moveaxis(x_BTJ, -1, 0))
    return jnp.moveaxis(split_JBT, 0, -1)


def _heard(valid_NBT: jax.Array, together: bool) -> jax.Array:
    """1.0 where the teacher predicts what a head does, inside the row, [N, B, T].

    Head i at t is taught by head 1 at t + i - 1.

    Args:
      valid_NBT: False where there is no target.
      together: only where it is so for all heads.
    """
    n, _, t = valid_NBT.shape
    place_T = jnp.array(zigzag.positions(t, time_parts(valid_NBT[0])))
    last_N1 = t - 1 - jnp.arange(n)[:, None]
    if together:
        last_N1 = jnp.full_like(last_N1, t - n)
        # Where the last target is valid, not all are: some may not be learned.
        whole_1BT = jnp.all(valid_NBT, axis=0, keepdims=True)
        valid_NBT = jnp.broadcast_to(whole_1BT, valid_NBT.shape)
    inside_N1T = (place_T[None] <= last_N1)[:, None]
    return jnp.where(valid_NBT & inside_N1T, 1.0, 0.0)


def head_sums(
    model: LanguageModel, batch: dict[str, jax.Array], compute: ComputeConfig
) -> HeadSums:
    """Sums and counts of every head over a batch, as of `batch_loss`.

    With more than one head, those of sampled acceptance are among them.
    """
    n = model.cfg.n_future_tokens
    loss = LossConfig(acceptance=n > 1)
    unweighted = StepWeights(jnp.zeros(n))
    return batch_loss(model, batch, unweighted, loss, compute)[1]


def head_hits(
    model: LanguageModel, batch: dict[str, jax.Array], compute: ComputeConfig
) -> tuple[jax.Array, jax.Array]:
    """Where the most likely token of each head is its target, and where there is one.

    Both are bool [N, B, T], over the batch of `batch_loss`.
    """
    unweighted = StepWeights(jnp.zeros(model.cfg.n_future_tokens))
    _, scores, token_NBT, valid_NBT = _scored(
        model, batch, unweighted, LossConfig(), compute
    )
    return scores.predicted == token_NBT, valid_NBT
