"""How well the heads predict: sums and counts a head, and their means.

Axes: B batch, T positions, N heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.loss.cross_entropy import TokenScores
from mtp_jax.parallel import zigzag
from mtp_jax.parallel.sequence import split_time, whole_time
from mtp_jax.parallel.sharding import time_parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadSums:
    """Sums over targets, float32, to be added up over batches before any division."""

    count_N: jax.Array  # targets
    nll_N: jax.Array  # negative log likelihood, nats
    correct_N: jax.Array  # targets that were the most likely token
    windows: jax.Array  # positions from which all n tokens are targets
    accepted_N: jax.Array  # windows in which head 1 would accept drafts up to head i
    # Over the windows, where there was a teacher: the probability that it accepts a
    # draft that is drawn from head i, and those up to head i. 1 each for head 1.
    alpha_N: jax.Array | None = None
    taken_N: jax.Array | None = None
    # Of the heads' gradients into the trunk: `TokenScores.with_first`, `squared`.
    with_first_N: jax.Array | None = None
    squared_N: jax.Array | None = None


def no_sums(n: int, acceptance: bool = False, gradients: bool = False) -> HeadSums:
    """The sums over no target at all, to begin with.

    Args:
      n: heads.
      acceptance: True if there are sums of sampled acceptance.
      gradients: True if there are sums of gradients.
    """
    zero_N, zero = jnp.zeros(n), jnp.zeros(())
    alpha_N = zero_N if acceptance else None
    of_grads_N = zero_N if gradients else None
    return HeadSums(
        *(zero_N, zero_N, zero_N),
        *(zero, zero_N),
        *(alpha_N, alpha_N),
        *(of_grads_N, of_grads_N),
    )


def sums_over_targets(
    scores: TokenScores,
    token_NBT: jax.Array,
    valid_NBT: jax.Array,
    active_N: jax.Array | None = None,
) -> HeadSums:
    """The sums and counts of every head over the targets that are valid.

    Args:
      scores: [N, B, T] each.
      token_NBT: targets, int32; their time may be split over devices.
      valid_NBT: False where there is no target.
      active_N: False for heads that did no work; their sums are 0. None: all did.
    """
    predicted_NBT, counted_NBT = scores.predicted, valid_NBT
    if active_N is not None:
        working_N11 = active_N[:, None, None]
        predicted_NBT = jnp.where(working_N11, predicted_NBT, -1)
        counted_NBT = counted_NBT & working_N11
        if scores.alpha is not None:
            # In a chain it may have been run for the heads that read it.
            alpha_NBT = jnp.where(working_N11, scores.alpha, 0.0)
            scores = dataclasses.replace(scores, alpha=alpha_NBT)

    def total_N(x_NBT):
        return jnp.sum(jnp.where(counted_NBT, x_NBT, 0), (1, 2), dtype=jnp.float32)

    window_BT = _window(valid_NBT)
    sums = HeadSums(
        count_N=total_N(1.0),
        nll_N=total_N(scores.nll),
        correct_N=total_N(predicted_NBT == token_NBT),
        **_acceptance(predicted_NBT, window_BT),
        with_first_N=scores.with_first,
        squared_N=scores.squared,
    )
    if scores.alpha is None:
        return sums
    return dataclasses.replace(sums, **_sampled_acceptance(scores.alpha, window_BT))


def _window(valid_NBT: jax.Array) -> jax.Array:
    """True where all n tokens count, and head 1's predictions of them are there."""
    n, _, t = valid_NBT.shape
    inside_T = zigzag.positions(t, time_parts(valid_NBT[0])) <= t - n
    return jnp.all(valid_NBT, axis=0) & inside_T[None]


def _sampled_acceptance(
    alpha_NBT: jax.Array, window_BT: jax.Array
) -> dict[str, jax.Array]:
    """Sums of the probabilities that drafts are accepted, one by one and as a prefix.

    Teacher-forced: head 1 reads the true text, as do heads that read tokens.
    """
    alpha_NBT = alpha_NBT.at[0].set(1.0)

    def total_N(x_NBT):
        return jnp.sum(jnp.where(window_BT[None], x_NBT, 0.0), axis=(1, 2))

    prefixes = [alpha_NBT[0]]
    for alpha_BT in alpha_NBT[1:]:
        prefixes.append(prefixes[-1] * alpha_BT)
    return {"alpha_N": total_N(alpha_NBT), "taken_N": total_N(jnp.stack(prefixes))}


def _acceptance(predicted_NBT: jax.Array, window_BT: jax.Array) -> dict[str, jax.Array]:
    """Counts how far heads 2..n, at t, agree with head 1 at the positions after it.

    Teacher-forced: head 1 reads the true text. Token t + i is drafted by head i at t
    and predicted by head 1 at t + i - 1, so a position counts only if all n - 1 of
    those lie in the row and in its document.
    """
    n = len(predicted_NBT)
    prefix_BT, accepted = window_BT, [window_BT]
    # Head 1 may predict the positions further on on another device.
    first_BT = whole_time(predicted_NBT[0])
    for i in range(1, n):
        # Shifted by a pad of -i: jax 0.12 loses the sharding of a slice of one row.
        later_BT = jax.lax.pad(first_BT, jnp.int32(-1), [(0, 0, 0), (-i, i, 0)])
        prefix_BT = prefix_BT & (predicted_NBT[i] == split_time(later_BT))
        accepted.append(prefix_BT)
    accepted_N = jnp.sum(jnp.stack(accepted), axis=(1, 2), dtype=jnp.float32)
    return {"windows": accepted_N[0], "accepted_N": accepted_N}


def summarize(sums: HeadSums) -> dict[str, jax.Array]:
    """Means of the sums: `loss_N` in nats, `accuracy_N`, `accepted_N` (share of windows
    accepted up to head i; 1 for head 1) and `accept_length`, tokens a forward pass.

    Where there are such sums, also `alpha_N`, the probability that a draft drawn from
    head i is accepted, `taken_N`, that those up to it are, and `sampled_length`, tokens
    a forward pass; and `cosine_N` and `ratio_N`, of each head's gradient into the trunk
    to head 1's.
    """
    count_N = jnp.maximum(sums.count_N, 1.0)
    windows = jnp.maximum(sums.windows, 1.0)
    accepted_N = sums.accepted_N / windows
    means = {
        "loss_N": sums.nll_N / count_N,
        "accuracy_N": sums.correct_N / count_N,
        "accepted_N": accepted_N,
        "accept_length": 1.0 + jnp.sum(accepted_N[1:]),
    }
    if sums.alpha_N is not None and sums.taken_N is not None:
        taken_N = sums.taken_N / windows
        means |= {
            "alpha_N": sums.alpha_N / windows,
            "taken_N": taken_N,
            "sampled_length": 1.0 + jnp.sum(taken_N[1:]),
        }
    if sums.squared_N is not None and sums.with_first_N is not None:
        norm_N = jnp.sqrt(jnp.maximum(sums.squared_N, 1e-30))
        means |= {
            "cosine_N": sums.with_first_N / (norm_N * norm_N[0]),
            "ratio_N": norm_N / norm_N[0],
        }
    return means
