"""From a head's normed output to the scores of its tokens, and the gradients of both.

Axes: B rows, T positions, D model width, V vocabulary, R groups of devices with tokens
of their own, r rank of the Markov bias, E = D + r where there is one, else D.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.config import ComputeConfig
from mtp_jax.loss.cross_entropy import (
    TokenScores,
    copy_unembedding,
    score_tokens,
    score_tokens_and_grad,
)
from mtp_jax.loss.targets import Targets
from mtp_jax.model.heads.walk import HeadInput, Weights, beside


@dataclasses.dataclass(frozen=True)
class Output:
    """Scores heads' outputs against the tables, which it has copied to every device."""

    copied: Weights  # unembedding and markov_out, [R, V, ...]
    z_loss: float
    compute: ComputeConfig

    def scores(
        self, weights: Weights, head: HeadInput, hidden_BTD: jax.Array
    ) -> TokenScores:
        """Scores [B, T] of the targets in `head.extra`, differentiable."""
        dtype = hidden_BTD.dtype.name
        side_BTr = beside(weights, head, dtype)
        hidden_BTE, w_RVE = self._side_by_side(weights, hidden_BTD, side_BTr)
        target_BT, chunk = head.extra.token_NBT, self.compute.chunk_tokens
        return score_tokens(hidden_BTE, w_RVE, target_BT, chunk)

    def scores_and_grad(
        self, weights: Weights, head: HeadInput, hidden_BTD: jax.Array
    ) -> tuple[TokenScores, jax.Array, Weights]:
        """The scores, the gradient of hidden_BTD and, float32, those of the tables.

        Of the targets in `head.extra`; see `score_tokens_and_grad`.
        """
        dtype = hidden_BTD.dtype.name
        side_BTr = beside(weights, head, dtype)
        hidden_BTE, w_RVE = self._side_by_side(weights, hidden_BTD, side_BTr)
        d = hidden_BTD.shape[-1]
        targets, compute = head.extra, self.compute
        scores, d_hidden_BTE, d_tables = score_tokens_and_grad(
            hidden_BTE,
            w_RVE,
            targets.token_NBT,
            targets.weight_NBT,
            self.z_loss,
            compute.chunk_tokens,
            (d,) if side_BTr is None else (d, side_BTr.shape[-1]),
        )
        if side_BTr is None:
            return scores, d_hidden_BTE, Weights(unembedding=d_tables[0])
        assert weights.markov_in is not None
        wide = weights.markov_in.astype(jnp.float32)

        def look_up(w_Vr):
            wide_in = dataclasses.replace(weights, markov_in=w_Vr)
            return beside(wide_in, head, dtype)

        _, backward = jax.vjp(look_up, wide)
        d_weights = Weights(
            unembedding=d_tables[0],
            markov_in=backward(d_hidden_BTE[..., d:])[0],
            markov_out=d_tables[1],
        )
        return scores, d_hidden_BTE[..., :d], d_weights

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
    common: Weights, dtype: str, z_loss: float, compute: ComputeConfig
) -> Output:
    """Copies the tables that all heads have in common, in a dtype."""

    def copied(w_VX):
        return None if w_VX is None else copy_unembedding(w_VX, dtype)

    tables = Weights(
        unembedding=copied(common.unembedding), markov_out=copied(common.markov_out)
    )
    return Output(tables, z_loss, compute)


def weighted(scores: TokenScores, targets: Targets, z_loss: float) -> jax.Array:
    """The loss: sum(weight (nll + z_loss log_z^2)), float32."""
    terms_NBT = scores.nll + z_loss * jnp.square(scores.log_z)
    return jnp.sum(targets.weight_NBT * terms_NBT)
