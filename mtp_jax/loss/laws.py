"""Losses between the law of a head and a teacher's, and their gradients.

Within `jax.shard_map`, where the vocabulary may lie on several devices: reductions over
it are sums over the shards. The dtype is that of the logits.

Axes: C tokens of a chunk, v tokens of a device's share of the vocabulary.

With p the teacher's law, q the head's, alpha = sum min(p, q), the gradients in the
head's logits, the teacher's being constant:

  kl   sum p log(p / q)                     q - p
  rkl  sum q log(q / p) = r                 q (log(q / p) - r)
  tv   1 - alpha                            -q ([q <= p] - s), s = sum of q [q <= p]
  nla  -log alpha                           that of tv / alpha
  lk   a kl + (1 - a) tv, a = exp(-3 alpha) a that of kl + (1 - a) that of tv

alpha is the probability that rejection sampling accepts a draft (arXiv:2211.17192,
theorem 3.5); tv (arXiv:2310.08461, section 4), lk (arXiv:2602.23881) with a constant.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.config import LossKind
from mtp_jax.parallel.sharding import axes_of

_LEAST_ALPHA = 1e-6  # below it, the gradient of -log alpha would be noise
_LK_RATE = 3.0


@dataclasses.dataclass(frozen=True)
class Law:
    """The law of some logits: log-partition and probabilities."""

    logits_Cv: jax.Array
    log_z_C: jax.Array
    probability_Cv: jax.Array

    @property
    def log_Cv(self) -> jax.Array:
        """Log-probabilities, which stay finite where probabilities vanish."""
        return self.logits_Cv - self.log_z_C[:, None]


def law_of(logits_Cv: jax.Array, log_z_C: jax.Array | None = None) -> Law:
    """The law of logits, of which each device has a share."""
    if log_z_C is None:
        top_C = lax.pmax(jnp.max(logits_Cv, axis=1), axes_of("logits"))
        log_z_C = top_C + jnp.log(over_vocab(jnp.exp(logits_Cv - top_C[:, None])))
    return Law(logits_Cv, log_z_C, jnp.exp(logits_Cv - log_z_C[:, None]))


def over_vocab(x_Cv: jax.Array) -> jax.Array:
    """The sum over the vocabulary, [C]."""
    return lax.psum(jnp.sum(x_Cv, axis=1), axes_of("logits"))


def acceptance(student: Law, teacher: Law) -> jax.Array:
    """The probability that a draft of the one is accepted by the other, [C]."""
    return over_vocab(jnp.minimum(student.probability_Cv, teacher.probability_Cv))


def entropy(law: Law) -> jax.Array:
    """The entropy of a law, nats, [C]."""
    return -over_vocab(law.probability_Cv * law.log_Cv)


def soft_loss(
    kind: LossKind, student: Law, teacher: Law, alpha_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token, [C], and its gradient in the student's logits, [C, v].

    Args:
      kind: any but hard. That of e2e is that of tv, for `end_to_end` to weigh.
      student, teacher: laws over the same vocabulary.
      alpha_C: from `acceptance`.
    """
    q_Cv, p_Cv = student.probability_Cv, teacher.probability_Cv
    if kind == "rkl":
        ratio_Cv = student.log_Cv - teacher.log_Cv
        divergence_C = over_vocab(q_Cv * ratio_Cv)
        return divergence_C, q_Cv * (ratio_Cv - divergence_C[:, None])
    if kind == "kl":
        return _kl(student, teacher)
    share_C = over_vocab(jnp.where(q_Cv <= p_Cv, q_Cv, 0.0))
    # Not from the terms of that sum, which would stay until then.
    d_tv_Cv = q_Cv * (share_C[:, None] - (q_Cv <= p_Cv))
    tv_C = 1.0 - alpha_C
    if kind == "nla":
        alpha_C = jnp.maximum(alpha_C, _LEAST_ALPHA)
        return -jnp.log(alpha_C), d_tv_Cv / alpha_C[:, None]
    if kind == "lk":
        mix_C = jnp.exp(-_LK_RATE * alpha_C)
        kl_C, d_kl_Cv = _kl(student, teacher)
        mix_C1 = mix_C[:, None]
        return (
            mix_C * kl_C + (1.0 - mix_C) * tv_C,
            mix_C1 * d_kl_Cv + (1.0 - mix_C1) * d_tv_Cv,
        )
    return tv_C, d_tv_Cv


def _kl(student: Law, teacher: Law) -> tuple[jax.Array, jax.Array]:
    p_Cv = teacher.probability_Cv
    # Of p alone, and not of the teacher's logits, which need not stay beside it.
    surprise_C = -over_vocab(jax.scipy.special.xlogy(p_Cv, p_Cv))
    cross_C = student.log_z_C - over_vocab(p_Cv * student.logits_Cv)
    return cross_C - surprise_C, student.probability_Cv - p_Cv


def end_to_end(
    alpha_NBT: jax.Array, counts_NBT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The share of drafts that are not accepted, and its slopes in 1 - alpha.

    loss = 1 - (1/(n-1)) sum over j = 2..n of the product of alpha_2 .. alpha_j
    (arXiv:2606.12370), the share of n - 1 drafts that one pass does not take. Its
    gradient is that of tv of each head times these slopes, so that a second pass over
    the heads needs nothing but them.

    Args:
      alpha_NBT: acceptance of each head's draft; that of head 1 is not read.
      counts_NBT: False for heads that wait: n is as if they were not there.

    Returns:
      the loss, [B, T], and the slopes, [N, B, T], 0 for head 1 and heads that wait.
    """
    counts_MBT = counts_NBT[1:].astype(jnp.float32)
    alpha_MBT = jnp.where(counts_NBT[1:], alpha_NBT[1:], 1.0)
    number_BT = jnp.maximum(jnp.sum(counts_MBT, axis=0), 1.0)
    # Drafts taken from head i on, if those before are: alpha_i (1 + alpha_(i+1) (...)).
    lengths = [jnp.zeros_like(alpha_NBT[0])]
    for alpha_BT, counts_BT in zip(alpha_MBT[::-1], counts_MBT[::-1], strict=True):
        lengths.append(alpha_BT * (counts_BT + lengths[-1]))
    loss_BT = 1.0 - lengths[-1] / number_BT
    slopes, before_BT = [jnp.zeros_like(loss_BT)], jnp.ones_like(loss_BT)
    of_heads = zip(alpha_MBT, counts_MBT, lengths[-2::-1], strict=True)
    for alpha_BT, counts_BT, after_BT in of_heads:
        slopes.append(counts_BT * before_BT * (1.0 + after_BT) / number_BT)
        before_BT = before_BT * alpha_BT
    return loss_BT, jnp.stack(slopes)
