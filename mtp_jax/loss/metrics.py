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
    windows: jax.Array  # positions from which all n tokens lie in one document
    accepted_N: jax.Array  # windows in which head 1 would accept drafts up to head i


def no_sums(n: int) -> HeadSums:
    """The sums over no target at all, to begin with."""
    zero_N, zero = jnp.zeros(n), jnp.zeros(())
    return HeadSums(zero_N, zero_N, zero_N, windows=zero, accepted_N=zero_N)


def sums_over_targets(
    scores: TokenScores, token_NBT: jax.Array, valid_NBT: jax.Array
) -> HeadSums:
    """The sums and counts of every head over the targets that are valid.

    Args:
      scores: [N, B, T] each.
      token_NBT: targets, int32; their time may be split over devices.
      valid_NBT: False where there is no target.
    """

    def total_N(x_NBT):
        return jnp.sum(jnp.where(valid_NBT, x_NBT, 0), (1, 2), dtype=jnp.float32)

    return HeadSums(
        count_N=total_N(1.0),
        nll_N=total_N(scores.nll),
        correct_N=total_N(scores.predicted == token_NBT),
        **_acceptance(scores.predicted, valid_NBT),
    )


def _acceptance(predicted_NBT: jax.Array, valid_NBT: jax.Array) -> dict[str, jax.Array]:
    """Counts how far heads 2..n, at t, agree with head 1 at the positions after it.

    Teacher-forced: head 1 reads the true text. Token t + i is drafted by head i at t
    and predicted by head 1 at t + i - 1, so a position counts only if all n - 1 of
    those lie in the row and in its document.
    """
    n, _, t = predicted_NBT.shape
    inside_T = zigzag.positions(t, time_parts(predicted_NBT[0])) <= t - n
    window_BT = valid_NBT[-1] & inside_T[None]
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
    accepted up to head i; 1 for head 1) and `accept_length`, tokens a forward pass."""
    count_N = jnp.maximum(sums.count_N, 1.0)
    accepted_N = sums.accepted_N / jnp.maximum(sums.windows, 1.0)
    return {
        "loss_N": sums.nll_N / count_N,
        "accuracy_N": sums.correct_N / count_N,
        "accepted_N": accepted_N,
        "accept_length": 1.0 + jnp.sum(accepted_N[1:]),
    }
