"""The tokens that each head must predict, and which of them count.

Axes: B batch, S = T + N tokens of a row, T positions, N heads, J extra targets.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """The token that each head must predict everywhere, and its weight in the loss.

    What is not None has the heads as its first axis.
    """

    token_NBT: jax.Array  # int32
    weight_NBT: jax.Array  # float32; 0 where nothing is to be predicted
    soft_NBT: jax.Array | None = None  # likewise, of the loss to a teacher's law
    slope_NBT: jax.Array | None = None  # instead of soft_NBT, of its gradient
    z_N: jax.Array | None = None  # weight of the squared log-partition, if one a head
    extra_NBTJ: jax.Array | None = None  # further targets of one head, int32
    extra_weight_NBTJ: jax.Array | None = None
    pull_N: jax.Array | None = None  # of the gradient into what the head reads
    table_N: jax.Array | None = None  # of the gradient of a shared unembedding
    active_N: jax.Array | None = None  # False: the head does no work, bool
    number_N: jax.Array | None = None  # of the head, from 0, int32; of a taught one


def future_targets(
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    n: int,
    learned_BS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The targets of every head: for head i at position t token t + i of its document.

    Args:
      tokens_BS: token ids; S = T + n, so that each head has a target everywhere.
      segments_BS: document number of each token; 0 is padding.
      n: how many tokens ahead are predicted.
      learned_BS: 1 for tokens that are to be learned, as targets of every head,
        wherever they are predicted from; None: all.

    Returns:
      targets_NBT, int32, and valid_NBT, False where the target lies in another document
      or in padding, or is not to be learned.

    Raises:
      ValueError: rows are too short to hold one position.
    """
    t = tokens_BS.shape[1] - n
    if t < 1:
        raise ValueError(
            f"rows of {tokens_BS.shape[1]} tokens hold no position with {n} tokens "
            "after it; rows must hold seq_len + n tokens."
        )
    offsets = range(1, n + 1)
    targets_NBT = jnp.stack([tokens_BS[:, i : i + t] for i in offsets])
    segments_NBT = jnp.stack([segments_BS[:, i : i + t] for i in offsets])
    here_BT = segments_BS[:, :t]
    valid_NBT = (segments_NBT == here_BT[None]) & (here_BT[None] != 0)
    if learned_BS is not None:
        valid_NBT &= jnp.stack([learned_BS[:, i : i + t] for i in offsets]) != 0
    return targets_NBT, valid_NBT


def extra_targets(
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    t: int,
    count: int,
    learned_BS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The tokens after the next one, as far as rows go: those at t + 2, t + 3 ...

    Args:
      tokens_BS, segments_BS: as for `future_targets`.
      t: positions of a row.
      count: J, of these tokens.
      learned_BS: as for `future_targets`.

    Returns:
      targets_BTJ, int32, and valid_BTJ, False where the target lies in another
      document, in padding or after the end of the row, or is not to be learned.
    """

    def later(x_BS, j):
        return jnp.pad(x_BS, ((0, 0), (0, j)))[:, j : j + t]

    after = range(2, count + 2)
    here_BT = segments_BS[:, :t]
    tokens_BTJ = jnp.stack([later(tokens_BS, j) for j in after], axis=-1)
    valid_BTJ = jnp.stack(
        [(later(segments_BS, j) == here_BT) & (here_BT != 0) for j in after], axis=-1
    )
    if learned_BS is not None:
        valid_BTJ &= jnp.stack([later(learned_BS, j) for j in after], axis=-1) != 0
    return tokens_BTJ, valid_BTJ


def target_counts(
    segments_BS: jax.Array, n: int, learned_BS: jax.Array | None = None
) -> jax.Array:
    """Number of targets of each head, float32 [N]."""
    _, valid_NBT = future_targets(segments_BS, segments_BS, n, learned_BS)
    return jnp.sum(valid_NBT, axis=(1, 2), dtype=jnp.float32)
