"""The heads' losses and their gradients, in three orders of the same arithmetic.

`naive`  all heads, then all logits: what the others are measured against.
`remat`  a head at a time; its backward pass computes it again.
`fused`  a head at a time, forward and backward at once: only its gradients remain of a
         head (`fused`). Nothing is computed twice but the bodies of heads in a chain.

Axes: N heads, B rows, T positions, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.config import ComputeConfig, LossConfig
from mtp_jax.loss.cross_entropy import TokenScores
from mtp_jax.loss.fused import forward_and_backward
from mtp_jax.loss.memory import Teacher
from mtp_jax.loss.output import make_output, weighted
from mtp_jax.loss.scored import reweigh_of, scored, taught_scores
from mtp_jax.loss.targets import Targets
from mtp_jax.model.attention import RowContext
from mtp_jax.model.heads.walk import (
    HeadRunner,
    all_hidden,
    needs_tokens,
    previous_tokens,
)
from mtp_jax.model.language_model import LanguageModel


def head_loss(
    model: LanguageModel,
    trunk_BTD: jax.Array,
    rows: RowContext,
    targets: Targets,
    loss: LossConfig,
    compute: ComputeConfig,
    teacher: Teacher | None = None,
) -> tuple[jax.Array, TokenScores]:
    """The weighted sum of all heads' losses over the targets, and [N, B, T] scores.

    sum(weight (nll + z_loss log_z^2)), float32, or what `loss` asks for beside it
    (`taught.teach`). `compute.head_loss` is the order of work. The scores carry no
    gradient.

    Args:
      model, trunk_BTD: the model, and its trunk's output.
      rows: of the batch.
      targets: and their weights, those of this step.
      loss: what is taught; its weights are in the targets already.
      compute: how the arithmetic is carried out.
      teacher: None for the model itself.

    Raises:
      TypeError: the fused loss is asked for forward-mode derivatives.
      NotImplementedError: the fused loss is asked for second derivatives.
    """
    parts = model.parts(trunk_BTD)
    if compute.head_loss == "fused":
        teacher = teacher or Teacher()
        total, scores = _fused(parts, rows, targets, teacher, model.cfg, loss, compute)
    elif loss.needs_teacher:  # of an evaluation
        scores = taught_scores(
            parts, rows, targets, teacher or Teacher(), model.cfg, loss, compute
        )
        total = weighted(scores, targets, loss)
    else:
        form = _FORMS[compute.head_loss]
        total, scores = form(parts, rows, targets, model.cfg, loss, compute)
    return total, lax.stop_gradient(scores)


def _naive(parts, rows, targets, cfg, loss, compute):
    runner = HeadRunner(cfg, rows, compute.attention)
    previous_NBT = previous_tokens(targets.token_NBT) if needs_tokens(cfg) else None
    logits_NBTV = all_hidden(runner, parts, previous_NBT)[1]
    log_z_NBT = jax.nn.logsumexp(logits_NBTV, axis=-1)
    ids_V = jnp.arange(logits_NBTV.shape[-1])[None, None, None]
    is_target_NBTV = ids_V == targets.token_NBT[..., None]
    picked_NBT = jnp.sum(jnp.where(is_target_NBTV, logits_NBTV, 0.0), axis=-1)
    scores = TokenScores(
        nll=log_z_NBT - picked_NBT,
        log_z=log_z_NBT,
        predicted=jnp.argmax(logits_NBTV, axis=-1).astype(jnp.int32),
    )
    return weighted(scores, targets, loss), scores


def _remat(parts, rows, targets, cfg, loss, compute):
    dtype = parts.trunk_BTD.dtype
    # The loop adds the gradients up in the dtype of what it reads, so it reads float32;
    # the products are in the compute dtype all the same.
    output = make_output(parts.own, parts.common, dtype.name, loss, compute)
    copied = jax.tree.map(lambda x: x.astype(jnp.float32), output.copied)
    output = dataclasses.replace(output, copied=copied)
    parts = dataclasses.replace(parts, trunk_BTD=parts.trunk_BTD.astype(jnp.float32))
    around = functools.partial(jax.checkpoint, prevent_cse=False)
    runner = HeadRunner(cfg, rows, compute.attention)
    scores = scored(parts, targets, runner, output, around)
    return weighted(scores, targets, loss), scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _fused(parts, rows, targets, teacher, cfg, loss, compute):
    """Primal of the custom VJP; used when no gradient is needed."""
    if loss.plain and not loss.measures_gradients:
        dtype = parts.trunk_BTD.dtype.name
        output = make_output(parts.own, parts.common, dtype, loss, compute)
        runner = HeadRunner(cfg, rows, compute.attention)
        scores = scored(parts, targets, runner, output)
        return weighted(scores, targets, loss), scores
    scores = taught_scores(parts, rows, targets, teacher, cfg, loss, compute)
    if loss.measures_gradients:
        zero_N = jnp.zeros(len(targets.token_NBT))
        scores = dataclasses.replace(scores, with_first=zero_N, squared=zero_N)
    return weighted(scores, targets, loss), scores


def _forward_and_backward(parts, rows, targets, teacher, cfg, loss, compute):
    """Forward rule of the custom VJP: loss, scores, and gradients for `_scale`."""
    parts = _first_order_only(parts)
    taught = (teacher, cfg, loss, compute)
    reweigh = reweigh_of(loss)
    if reweigh is not None:
        targets = reweigh(taught_scores(parts, rows, targets, *taught), targets)
    scores, grads = forward_and_backward(
        cfg, parts, rows, targets, teacher, loss, compute
    )
    return (weighted(scores, targets, loss), scores), grads


def _scale(cfg, loss, compute, grads, cotangents):
    del cfg, loss, compute
    d_loss, _ = cotangents  # the scores' never count: head_loss stops them
    return jax.tree.map(lambda x: (d_loss * x).astype(x.dtype), grads), None, None, None


_fused.defvjp(_forward_and_backward, _scale)

_FORMS: dict[str, Callable[..., tuple[jax.Array, TokenScores]]] = {
    "naive": _naive,
    "remat": _remat,
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
