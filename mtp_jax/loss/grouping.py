"""How far ahead it pays to look: groups of tokens between rises of the entropy.

AdaMTP (arXiv:2608.00434): a group ends where the next token's law is much less certain
than this one's. Within it, heads predict as far as its end; at its last token, as far
as the end of the group after it. The law at t is that of token t + 1, so a group of
positions up to e is of tokens up to e + 1.

Axes: B rows, T positions.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.parallel.sequence import split_time, whole_time


def depth_of_groups(
    entropy_BT: jax.Array, segments_BT: jax.Array, threshold: float
) -> jax.Array:
    """How many tokens beyond the next one each position is to predict, int32 [B, T].

    Head i + 1 is to be trained where i is at most this number.

    Args:
      entropy_BT: of head 1's law, nats; its time may be split over devices.
      segments_BT: document numbers of whole rows; a document ends a group.
      threshold: a rise of the entropy, nats, above which a group ends.
    """
    whole_BT = whole_time(entropy_BT)
    t = whole_BT.shape[1]
    place_1T = jnp.arange(t, dtype=jnp.int32)[None]

    def following(x_BT):
        # Shifted by a pad of -1: jax 0.12 loses the sharding of a slice of one row.
        return lax.pad(x_BT, jnp.zeros((), x_BT.dtype), [(0, 0, 0), (-1, 1, 0)])

    ends_BT = (following(whole_BT) - whole_BT > threshold) | (
        following(segments_BT) != segments_BT
    )
    ends_BT |= place_1T == t - 1
    end_BT = lax.cummin(jnp.where(ends_BT, place_1T, t - 1), axis=1, reverse=True)
    of_next_BT = jnp.where(place_1T == t - 1, t - 1, following(end_BT))
    return split_time(jnp.where(ends_BT, of_next_BT, end_BT) - place_1T)
