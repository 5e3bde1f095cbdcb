"""Scores of all heads without gradients: of evaluations, and of a first of two passes.

Axes: N heads, B rows, T positions, D model width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.config import ComputeConfig, LossConfig, ModelConfig
from mtp_jax.loss.cross_entropy import TokenScores
from mtp_jax.loss.laws import end_to_end
from mtp_jax.loss.memory import Teacher
from mtp_jax.loss.output import Output, make_output
from mtp_jax.loss.targets import Targets
from mtp_jax.model.heads.walk import (
    HeadRunner,
    Parts,
    in_turn,
    needs_tokens,
    previous_tokens,
    visit_heads,
)
from mtp_jax.model.language_model import LanguageModel
from mtp_jax.parallel.sequence import from_next

# Any pure function of the scores of a first pass and of the targets, to the targets of
# the second; its results are constants to the gradient.
Reweigh = Callable[[TokenScores, Targets], Targets]


def scored(
    parts: Parts,
    targets: Targets,
    runner: HeadRunner,
    output: Output,
    around: Callable[[Callable], Callable] = lambda one_head: one_head,
) -> TokenScores:
    """Scores of cross entropy, [N, B, T], a head at a time, differentiable."""
    cfg = runner.cfg
    previous_NBT = previous_tokens(targets.token_NBT) if needs_tokens(cfg) else None
    return visit_heads(runner, parts, previous_NBT, targets, output.scores, around)


def taught_scores(
    parts: Parts,
    rows: Any,
    targets: Targets,
    teacher: Teacher,
    cfg: ModelConfig,
    loss: LossConfig,
    compute: ComputeConfig,
) -> TokenScores:
    """Scores of all that is taught, [N, B, T], a head at a time, without gradients.

    Head 1 runs once more before all, so that this serves heads of every kind. An
    entropy mask, which its scores decide, changes none of them but `loss`.
    """
    dtype = parts.trunk_BTD.dtype.name
    output = make_output(
        parts.own, parts.common, dtype, loss, compute, teacher.unembedding_VD
    )
    runner = HeadRunner(cfg, rows, compute.attention)
    previous_NBT = previous_tokens(targets.token_NBT) if needs_tokens(cfg) else None
    teacher_BTD = teacher.hidden_BTD
    if teacher_BTD is not None:
        teacher_BTD = teacher_BTD.astype(dtype)
    elif loss.needs_teacher:
        teacher_BTD = _first_hidden(runner, parts)

    def visit(weights, head, hidden_BTD):
        heard_BTD = teacher_BTD
        if heard_BTD is not None:
            heard_BTD = lax.fori_loop(
                0, head.extra.number_N, lambda _, x_BTD: from_next(x_BTD), heard_BTD
            )
        return output.taught_scores(weights, head, hidden_BTD, heard_BTD)

    return visit_heads(runner, parts, previous_NBT, targets, visit)


def _first_hidden(runner: HeadRunner, parts: Parts) -> jax.Array:
    """The normed output of head 1, which reads no token after its own, [B, T, D]."""
    if runner.cfg.heads.wiring.reads == "after":  # all others are on its way
        hidden_NBTD = visit_heads(
            runner, parts, None, None, lambda _, __, hidden_BTD: hidden_BTD
        )
        return hidden_NBTD[0]
    first, rest = in_turn(runner.cfg, parts, None, None)
    common = parts.common
    if first is None:
        first = jax.tree.map(lambda x: x[0], rest)
    else:
        common = dataclasses.replace(common, body=None)
    assert first is not None
    weights = first.own | common
    stream_BTD = runner.stream(weights, parts.trunk_BTD, first.previous_BT)
    return runner.hidden(weights, stream_BTD)


def reweigh_of(loss: LossConfig) -> Reweigh | None:
    """How the second pass of a loss of two passes is weighed; None: it is of one."""
    return _end_to_end_weights if loss.kind == "e2e" else None


def _end_to_end_weights(scores: TokenScores, targets: Targets) -> Targets:
    """The slopes of the end-to-end loss, times the weight that all heads have of it."""
    assert scores.alpha is not None and targets.soft_NBT is not None
    joint_1BT = jnp.sum(targets.soft_NBT, axis=0, keepdims=True)
    slope_NBT = joint_1BT * end_to_end(scores.alpha, targets.soft_NBT > 0)[1]
    return dataclasses.replace(targets, slope_NBT=slope_NBT)


def teacher_of(
    model: LanguageModel,
    trunk_BTD: jax.Array,
    rows: Any,
    compute: ComputeConfig,
) -> Teacher:
    """Another model's head 1 as a teacher; no gradient comes to it.

    Args:
      model: over the same vocabulary.
      trunk_BTD: its trunk's output.
      rows: of the batch.
      compute: how the arithmetic is carried out.
    """
    parts = model.parts(trunk_BTD)
    runner = HeadRunner(model.cfg, rows, compute.attention)
    hidden_BTD = _first_hidden(runner, parts)
    own, common = parts.own.unembedding, parts.common.unembedding
    return Teacher(hidden_BTD, common if own is None else own[0])
