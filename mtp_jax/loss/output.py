"""From a head's normed output to the scores of its tokens, and the gradients of both.

Axes: B rows, T positions, D model width, V vocabulary, R groups of devices with tokens
of their own, r rank of the Markov bias, E = D + r where there is one, else D.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.config import ComputeConfig, LossConfig
from mtp_jax.loss.cross_entropy import (
    TokenScores,
    copy_unembedding,
    score_tokens,
    score_tokens_and_grad,
)
from mtp_jax.loss.laws import end_to_end
from mtp_jax.loss.targets import Targets
from mtp_jax.loss.taught import Lesson, Manner, teach
from mtp_jax.model.heads.walk import HeadInput, Weights, beside


@dataclasses.dataclass(frozen=True)
class Output:
    """Scores heads' outputs against the tables, which it has copied to every device."""

    copied: Weights  # unembedding and markov_out, [R, V, ...]
    loss: LossConfig
    compute: ComputeConfig
    teacher_RVD: jax.Array | None = None  # its unembedding

    def scores(
        self, weights: Weights, head: HeadInput, hidden_BTD: jax.Array
    ) -> TokenScores:
        """Scores [B, T] of the targets in `head.extra`, differentiable."""
        dtype = hidden_BTD.dtype.name
        side_BTr = beside(weights, head, dtype)
        hidden_BTE, w_RVE = self._side_by_side(weights, hidden_BTD, side_BTr)
        target_BT, chunk = head.extra.token_NBT, self.compute.chunk_tokens
        return score_tokens(hidden_BTE, w_RVE, target_BT, chunk)

    def taught_scores(
        self,
        weights: Weights,
        head: HeadInput,
        hidden_BTD: jax.Array,
        teacher_BTD: jax.Array | None,
    ) -> TokenScores:
        """Scores [B, T] with all that a teacher gives; not differentiable."""
        side_BTr = beside(weights, head, hidden_BTD.dtype.name)
        hidden_BTE, w_RVE = self._side_by_side(weights, hidden_BTD, side_BTr)
        lesson = self._lesson(head.extra, teacher_BTD, None)
        manner, chunk = self._manner, self.compute.chunk_tokens
        return teach(
            hidden_BTE, w_RVE, self.teacher_RVD, lesson, manner, chunk, (), False
        )[0]

    def scores_and_grad(
        self,
        weights: Weights,
        head: HeadInput,
        hidden_BTD: jax.Array,
        teacher_BTD: jax.Array | None = None,
        keep_BT: jax.Array | None = None,
    ) -> tuple[TokenScores, jax.Array, Weights]:
        """The scores, the gradient of hidden_BTD and, float32, those of the tables.

        Of the targets in `head.extra`; see `score_tokens_and_grad` and `teach`.

        Args:
          weights: of the head.
          head: with its targets.
          hidden_BTD: its normed output.
          teacher_BTD: the teacher's, for the same tokens.
          keep_BT: False where the head is not to be trained; None: nowhere.
        """
        dtype = hidden_BTD.dtype.name
        side_BTr = beside(weights, head, dtype)
        hidden_BTE, w_RVE = self._side_by_side(weights, hidden_BTD, side_BTr)
        d, targets, chunk = hidden_BTD.shape[-1], head.extra, self.compute.chunk_tokens
        widths = (d,) if side_BTr is None else (d, side_BTr.shape[-1])
        if self.loss.plain:
            found = score_tokens_and_grad(
                hidden_BTE,
                w_RVE,
                targets.token_NBT,
                targets.weight_NBT,
                self.loss.z_loss,
                chunk,
                widths,
            )
        else:
            lesson, manner = self._lesson(targets, teacher_BTD, keep_BT), self._manner
            found = teach(
                hidden_BTE, w_RVE, self.teacher_RVD, lesson, manner, chunk, widths
            )
        scores, d_hidden_BTE, d_tables = found
        d_unembedding_VD = d_tables[0]
        if targets.table_N is not None:
            d_unembedding_VD = d_unembedding_VD * targets.table_N
        if side_BTr is None:
            return scores, d_hidden_BTE, Weights(unembedding=d_unembedding_VD)
        assert weights.markov_in is not None
        wide = weights.markov_in.astype(jnp.float32)

        def look_up(w_Vr):
            wide_in = dataclasses.replace(weights, markov_in=w_Vr)
            return beside(wide_in, head, dtype)

        _, backward = jax.vjp(look_up, wide)
        d_weights = Weights(
            unembedding=d_unembedding_VD,
            markov_in=backward(d_hidden_BTE[..., d:])[0],
            markov_out=d_tables[1],
        )
        return scores, d_hidden_BTE[..., :d], d_weights

    @property
    def _manner(self) -> Manner:
        loss = self.loss
        return Manner(loss.kind, loss.label_smoothing, loss.mask == "entropy")

    def _lesson(
        self,
        targets: Targets,
        teacher_BTD: jax.Array | None,
        keep_BT: jax.Array | None,
    ) -> Lesson:
        hard_BT, soft_BT = targets.weight_NBT, targets.soft_NBT
        if keep_BT is not None:
            hard_BT = jnp.where(keep_BT, hard_BT, 0.0)
            if soft_BT is not None:
                soft_BT = jnp.where(keep_BT, soft_BT, 0.0)
        slope_BT = soft_BT if targets.slope_NBT is None else targets.slope_NBT
        z = self.loss.z_loss if targets.z_N is None else targets.z_N
        # The weight of a head is that of both its parts.
        z_BT = z * (hard_BT if soft_BT is None else hard_BT + soft_BT)
        return Lesson(
            targets.token_NBT,
            hard_BT,
            z_BT,
            slope_BT,
            teacher_BTD,
            targets.extra_NBTJ,
            targets.extra_weight_NBTJ,
        )

    def _side_by_side(self, weights, hidden_BTD, side_BTr):
        w_RVD = self.copied.unembedding
        if w_RVD is None:  # one a head
            w_RVD = copy_unembedding(weights.unembedding, hidden_BTD.dtype.name)
        if side_BTr is None:
            return hidden_BTD, w_RVD
        assert self.copied.markov_out is not None
        out_RVr = self.copied.markov_out.astype(w_RVD.dtype)
        return (
            jnp.concatenate([hidden_BTD, side_BTr], axis=-1),
            jnp.concatenate([w_RVD, out_RVr], axis=-1),
        )


def make_output(
    parts_own: Weights,
    common: Weights,
    dtype: str,
    loss: LossConfig,
    compute: ComputeConfig,
    teacher_VD: jax.Array | None = None,
) -> Output:
    """Copies the tables that all heads have in common, in a dtype.

    Args:
      parts_own, common: weights of the heads; the teacher's table may be head 1's own.
      dtype: of the products.
      loss, compute: of the run.
      teacher_VD: the unembedding of a teacher that is not the model itself.
    """

    def copied(w_VX):
        return None if w_VX is None else copy_unembedding(w_VX, dtype)

    tables = Weights(
        unembedding=copied(common.unembedding), markov_out=copied(common.markov_out)
    )
    teacher_RVD = None
    if loss.needs_teacher:
        teacher_RVD = copied(teacher_VD)
        if teacher_RVD is None:
            own = parts_own.unembedding
            teacher_RVD = tables.unembedding if own is None else copied(own[0])
    return Output(tables, loss, compute, teacher_RVD)


def weighted(scores: TokenScores, targets: Targets, loss: LossConfig) -> jax.Array:
    """The loss: the sum over heads and tokens of weight times loss, float32.

    Of cross entropy that is weight (nll + z_loss log_z^2).
    """
    if scores.loss is None:
        terms_NBT = scores.nll + loss.z_loss * jnp.square(scores.log_z)
        return jnp.sum(targets.weight_NBT * terms_NBT)
    total = jnp.sum(scores.loss)
    if loss.kind == "e2e" and targets.soft_NBT is not None:
        assert scores.alpha is not None
        joint_BT = jnp.sum(targets.soft_NBT, axis=0)
        lost_BT, _ = end_to_end(scores.alpha, targets.soft_NBT > 0)
        total += jnp.sum(joint_BT * lost_BT)
    return total
