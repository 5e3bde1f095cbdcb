"""Losses of tokens beyond cross entropy of one target, a chunk of tokens at a time.

The logits of a head, and where there is a teacher those of it, are made for one chunk,
used for the scores and the gradient, and gone: two chunks of logits instead of one.

Axes: B rows, T positions, D model width, V vocabulary, R groups of devices with tokens
of their own, J extra targets. On one device, as in `cross_entropy`: b, t, C, v.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.config import LossKind
from mtp_jax.loss.cross_entropy import (
    COPIES,
    HIDDEN,
    TOKENS,
    TokenScores,
    add_copies,
    dot,
    is_token,
    logits_of,
    scan_chunks,
    scores_of,
)
from mtp_jax.loss.laws import acceptance, entropy, law_of, over_vocab, soft_loss
from mtp_jax.loss.pooling import added_to_own, of_own_tokens, pooled
from mtp_jax.parallel.sharding import axes_of, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lesson:
    """The lesson of the tokens of one head. Weights are float32, [B, T] each."""

    target_BT: jax.Array  # int32
    hard_BT: jax.Array  # weight of cross entropy
    z_BT: jax.Array  # weight of the squared log-partition
    soft_BT: jax.Array | None = None  # weight of the loss to the teacher's law
    teacher_BTD: jax.Array | None = None  # what the teacher's unembedding reads
    extra_BTJ: jax.Array | None = None  # further targets, int32
    extra_weight_BTJ: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Manner:
    """How they are taught; static."""

    kind: LossKind
    smoothing: float
    entropies: bool  # also measure the entropy of the head's law


def teach(
    hidden_BTD: jax.Array,
    w_RVD: jax.Array,
    teacher_w_RVD: jax.Array | None,
    lesson: Lesson,
    manner: Manner,
    chunk_tokens: int,
    widths: tuple[int, ...],
    gradient: bool = True,
) -> tuple[TokenScores, jax.Array, tuple[jax.Array, ...]]:
    """Scores with the weighted loss of each token, and the gradients of its sum.

    loss = hard ((1 - e) nll + e mean over the vocabulary of the nll of each)
    + z log_z^2 + soft (the loss of `laws`) + sum over extra targets of weight nll,
    e being the smoothing.

    Args:
      hidden_BTD, w_RVD, chunk_tokens, widths: as for `score_tokens_and_grad`.
      teacher_w_RVD: the teacher's unembedding, of the first tables' width.
      lesson: of this head.
      manner: of this run.
      gradient: False to leave the gradients out; what is returned of them is empty.

    Returns:
      as `score_tokens_and_grad`. Scores have `loss`, with a teacher `alpha`, and where
      the manner asks for it `entropy`.
    """
    widths = widths or (w_RVD.shape[-1],)

    def local(hidden_btD, w_1vD, teacher_1vD, lesson):
        w_vD = w_1vD[0]
        teacher_vD = None if teacher_1vD is None else teacher_1vD[0]

        def one_chunk(d_w_vD, token):
            hidden_CD, lesson = pooled(token)
            logits_Cv = logits_of(hidden_CD, w_vD)
            scores, d_logits_Cv = _chunk(logits_Cv, teacher_vD, lesson, manner)
            scores = of_own_tokens(scores)
            if not gradient:
                return d_w_vD, (scores, ())
            d_logits_Cv = d_logits_Cv.astype(hidden_CD.dtype)
            d_hidden_CD = dot("cv,vd->cd", d_logits_Cv, w_vD).astype(hidden_CD.dtype)
            d_w_vD += dot("cv,cd->vd", d_logits_Cv, hidden_CD)
            return d_w_vD, (scores, added_to_own(d_hidden_CD))

        carry = jnp.zeros_like(w_vD, jnp.float32) if gradient else ()
        d_w_vD, (scores, d_hidden_btD) = scan_chunks(
            one_chunk, carry, (hidden_btD, lesson), w_vD.shape[0], chunk_tokens
        )
        if not gradient:
            return scores, (), ()
        d_hidden_btD = lax.psum(d_hidden_btD, axes_of("vocab"))
        ends = list(itertools.accumulate(widths))[:-1]
        tables = jnp.split(d_w_vD.astype(w_vD.dtype), ends, axis=1)
        return scores, d_hidden_btD, tuple(map(add_copies, tables))

    by_width = spec("vocab", "embed")
    specs = jax.tree.map(lambda x: HIDDEN if x.ndim == 3 else TOKENS, lesson)
    none = () if not gradient else None
    scores, d_hidden_BTD, d_tables = jax.shard_map(
        local,
        in_specs=(HIDDEN, COPIES, None if teacher_w_RVD is None else COPIES, specs),
        out_specs=(
            TOKENS,
            HIDDEN if none is None else none,
            (by_width,) * len(widths) if none is None else none,
        ),
    )(hidden_BTD, w_RVD, teacher_w_RVD, lesson)
    return scores, d_hidden_BTD, tuple(x.astype(jnp.float32) for x in d_tables)


def _chunk(
    logits_Cv: jax.Array, teacher_vD: jax.Array | None, lesson: Any, manner: Manner
) -> tuple[TokenScores, jax.Array]:
    """Scores of a chunk's tokens, and the gradient of their losses in the logits."""
    scores = scores_of(logits_Cv, lesson.target_BT)
    student = law_of(logits_Cv, scores.log_z)
    v = logits_Cv.shape[1]
    vocab = v * lax.axis_size(axes_of("logits"))
    hard_C, z_C, e = lesson.hard_BT, lesson.z_BT, manner.smoothing
    loss_C = hard_C * scores.nll + z_C * jnp.square(scores.log_z)
    pull_C1 = (hard_C + 2.0 * z_C * scores.log_z)[:, None]
    d_logits_Cv = student.probability_Cv * pull_C1
    right_C1 = ((1.0 - e) * hard_C)[:, None]
    d_logits_Cv -= jnp.where(is_token(v, lesson.target_BT), right_C1, 0.0)
    if e:
        mean_C = scores.log_z - over_vocab(logits_Cv) / vocab
        loss_C += e * hard_C * (mean_C - scores.nll)
        d_logits_Cv -= (e / vocab * hard_C)[:, None]
    for j in range(0 if lesson.extra_BTJ is None else lesson.extra_BTJ.shape[-1]):
        target_C, weight_C = lesson.extra_BTJ[:, j], lesson.extra_weight_BTJ[:, j]
        hit_Cv = is_token(v, target_C)
        picked_C = over_vocab(jnp.where(hit_Cv, logits_Cv, 0.0))
        loss_C += weight_C * (scores.log_z - picked_C)
        d_logits_Cv += weight_C[:, None] * (student.probability_Cv - hit_Cv)
    alpha_C = None
    if lesson.teacher_BTD is not None:
        assert teacher_vD is not None
        teacher = law_of(logits_of(lesson.teacher_BTD, teacher_vD))
        # Or a compiler makes it again from the logits, and both of them stay.
        fixed_Cv = lax.optimization_barrier(teacher.probability_Cv)
        teacher = dataclasses.replace(teacher, probability_Cv=fixed_Cv)
        alpha_C = acceptance(student, teacher)
        if lesson.soft_BT is not None:
            soft_C, d_soft_Cv = soft_loss(manner.kind, student, teacher, alpha_C)
            if manner.kind != "e2e":  # known once all heads are
                loss_C += lesson.soft_BT * soft_C
            d_logits_Cv += lesson.soft_BT[:, None] * d_soft_Cv
    entropy_C = entropy(student) if manner.entropies else None
    scores = dataclasses.replace(scores, loss=loss_C, alpha=alpha_C, entropy=entropy_C)
    return scores, d_logits_Cv
