"""How much each head's loss counts.

Axes: N heads.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import LossConfig


def head_weights(cfg: LossConfig, n: int) -> jax.Array:
    """Weight of each head's mean loss, float32 [N]; all 1 is the paper's sum."""
    if cfg.head_weights:
        return jnp.array(cfg.head_weights, jnp.float32)
    return cfg.head_decay ** jnp.arange(n, dtype=jnp.float32)
