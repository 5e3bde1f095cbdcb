"""The tokens that each head must predict, and which of them count.

Axes: B batch, S = T + N tokens of a row, T positions, N heads.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """The token that each head must predict everywhere, and its weight in the loss."""

    token_NBT: jax.Array  # int32
    weight_NBT: jax.Array  # float32; 0 where nothing is to be predicted


def future_targets(
    tokens_BS: jax.Array, segments_BS: jax.Array, n: int
) -> tuple[jax.Array, jax.Array]:
    """The targets of every head: for head i at position t token t + i of its document.

    Args:
      tokens_BS: token ids; S = T + n, so that each head has a target everywhere.
      segments_BS: document number of each token; 0 is padding.
      n: how many tokens ahead are predicted.

    Returns:
      targets_NBT, int32, and valid_NBT, False where the target lies in another document
      or in padding.

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
    return targets_NBT, (segments_NBT == here_BT[None]) & (here_BT[None] != 0)


def target_counts(segments_BS: jax.Array, n: int) -> jax.Array:
    """Number of targets of each head, float32 [N]."""
    _, valid_NBT = future_targets(segments_BS, segments_BS, n)
    return jnp.sum(valid_NBT, axis=(1, 2), dtype=jnp.float32)
