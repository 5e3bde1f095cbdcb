"""The heads' losses and their gradients, in three orders of the same arithmetic.

`naive`  all heads, then all logits: what the others are measured against.
`remat`  a head at a time; its backward pass computes it again.
`fused`  a head at a time, forward and backward at once: nothing is computed twice, and
         only its gradients remain of a head (arXiv:2404.19737, section 2, figure 2).

Axes: N heads, B rows, T positions, D model width, V vocabulary, R groups of devices
with tokens of their own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.config import ComputeConfig, HeadLoss
from mtp_jax.loss.cross_entropy import (
    TokenScores,
    copy_unembedding,
    score_tokens,
    score_tokens_and_grad,
)
from mtp_jax.loss.targets import Targets
from mtp_jax.model.attention import RowContext
from mtp_jax.model.block import Block
from mtp_jax.model.heads.parallel import run_head
from mtp_jax.model.kernels import KEPT
from mtp_jax.model.language_model import LanguageModel
from mtp_jax.model.layers import unembed
from mtp_jax.parallel.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """The arrays that the heads' losses have gradients for."""

    heads: Block  # a stack, [N, ...] in every parameter
    norm_D: jax.Array
    unembedding_VD: jax.Array  # as it is stored
    trunk_BTD: jax.Array


def head_loss(
    model: LanguageModel,
    trunk_BTD: jax.Array,
    rows: RowContext,
    targets: Targets,
    z_loss: float,
    compute: ComputeConfig,
) -> tuple[jax.Array, TokenScores]:
    """The weighted sum of all heads' losses over the targets, and [N, B, T] scores.

    loss = sum(weight (nll + z_loss log_z^2)), float32. `compute.head_loss` is the order
    of work. The scores carry no gradient.

    Raises:
      TypeError: the fused loss is asked for forward-mode derivatives.
      NotImplementedError: the fused loss is asked for second derivatives.
    """
    parts = Parts(model.heads, model.norm[...], model.unembedding_param(), trunk_BTD)
    loss, scores = _FORMS[compute.head_loss](parts, rows, targets, z_loss, compute)
    return loss, lax.stop_gradient(scores)


def _weighted(scores: TokenScores, weight_NBT: jax.Array, z_loss: float) -> jax.Array:
    return jnp.sum(weight_NBT * (scores.nll + z_loss * jnp.square(scores.log_z)))


def _naive(parts, rows, targets, z_loss, compute):
    def one_head(_, head):
        hidden_BTD = run_head(
            head, parts.norm_D, parts.trunk_BTD, rows, compute.attention
        )
        return None, hidden_BTD

    hidden_NBTD = lax.scan(one_head, None, parts.heads)[1]
    w_VD = parts.unembedding_VD.astype(hidden_NBTD.dtype)
    w_VD = jax.sharding.reshard(w_VD, spec("vocab", None))
    out = spec(None, "batch", "time", "vocab")
    logits_NBTV = unembed(hidden_NBTD, w_VD, out)
    log_z_NBT = jax.nn.logsumexp(logits_NBTV, axis=-1)
    ids_V = jnp.arange(logits_NBTV.shape[-1])[None, None, None]
    is_target_NBTV = ids_V == targets.token_NBT[..., None]
    picked_NBT = jnp.sum(jnp.where(is_target_NBTV, logits_NBTV, 0.0), axis=-1)
    scores = TokenScores(
        nll=log_z_NBT - picked_NBT,
        log_z=log_z_NBT,
        predicted=jnp.argmax(logits_NBTV, axis=-1).astype(jnp.int32),
    )
    return _weighted(scores, targets.weight_NBT, z_loss), scores


def _remat(parts, rows, targets, z_loss, compute):
    dtype = parts.trunk_BTD.dtype
    # The loop adds the gradients up in the dtype of what it reads, so it reads float32;
    # the products are in the compute dtype all the same.
    w_RVD = copy_unembedding(parts.unembedding_VD, dtype).astype(jnp.float32)
    trunk_BTD = parts.trunk_BTD.astype(jnp.float32)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_head(_, x):
        head, target_BT = x
        hidden_BTD = run_head(
            head, parts.norm_D, trunk_BTD.astype(dtype), rows, compute.attention
        )
        return None, score_tokens(hidden_BTD, w_RVD, target_BT, compute.chunk_tokens)

    scores = lax.scan(one_head, None, (parts.heads, targets.token_NBT))[1]
    return _weighted(scores, targets.weight_NBT, z_loss), scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused(parts, rows, targets, z_loss, compute):
    """Primal of the custom VJP; used when no gradient is needed."""
    w_RVD = copy_unembedding(parts.unembedding_VD, parts.trunk_BTD.dtype)

    def one_head(_, x):
        head, token_BT = x
        hidden_BTD = run_head(
            head, parts.norm_D, parts.trunk_BTD, rows, compute.attention
        )
        return None, score_tokens(hidden_BTD, w_RVD, token_BT, compute.chunk_tokens)

    scores = lax.scan(one_head, None, (parts.heads, targets.token_NBT))[1]
    return _weighted(scores, targets.weight_NBT, z_loss), scores


def _forward_and_backward(parts, rows, targets, z_loss, compute):
    """Forward rule of the custom VJP: loss, scores, and gradients for `_scale`."""
    parts = _first_order_only(parts)
    trunk_BTD = parts.trunk_BTD
    # A head's products are kept until its backward pass, a moment later; what is cheap,
    # norms and activation functions, is computed again: it would take as much room.
    policies = jax.checkpoint_policies
    keep = policies.save_from_both_policies(
        policies.dots_saveable, policies.save_only_these_names(KEPT)
    )
    run = jax.checkpoint(
        lambda *of: run_head(of[0], of[1], of[2], rows, compute.attention), policy=keep
    )
    w_RVD = copy_unembedding(parts.unembedding_VD, trunk_BTD.dtype)

    def one_head(total, x):
        head, token_BT, weight_BT = x
        hidden_BTD, backward = jax.vjp(run, head, parts.norm_D, trunk_BTD)
        scores, d_hidden_BTD, d_w_VD = score_tokens_and_grad(
            hidden_BTD, w_RVD, token_BT, weight_BT, z_loss, compute.chunk_tokens
        )
        # The head's backward pass waits until the unembedding's whole gradient is gone
        # from the device: they need not be there together.
        d_hidden_BTD, d_w_VD = lax.optimization_barrier((d_hidden_BTD, d_w_VD))
        d_head, d_norm_D, d_trunk_BTD = backward(d_hidden_BTD)
        total = jax.tree.map(jnp.add, total, (d_norm_D, d_w_VD, d_trunk_BTD))
        return total, (scores, d_head)

    shared = (parts.norm_D, parts.unembedding_VD, trunk_BTD)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), shared)
    xs = (parts.heads, targets.token_NBT, targets.weight_NBT)
    total, (scores, d_heads) = lax.scan(one_head, zeros, xs)
    grads = jax.tree.map(
        lambda grad, x: grad.astype(x.dtype), Parts(d_heads, *total), parts
    )
    return (_weighted(scores, targets.weight_NBT, z_loss), scores), grads


def _scale(z_loss, compute, grads, cotangents):
    del z_loss, compute
    d_loss, _ = cotangents  # the scores' never count: head_loss stops them
    return jax.tree.map(lambda x: (d_loss * x).astype(x.dtype), grads), None, None


_fused.defvjp(_forward_and_backward, _scale)

_FORMS: dict[HeadLoss, Callable[..., tuple[jax.Array, TokenScores]]] = {
    "naive": _naive,
    "remat": _remat,
    "fused": _fused,
}


@jax.custom_jvp
def _first_order_only(x: Any) -> Any:
    return x


@_first_order_only.defjvp
def _(primals, tangents):
    raise NotImplementedError(
        "The fused head loss has first derivatives only, since its forward pass makes "
        "them; for higher ones set config.compute.head_loss to remat or naive."
    )
