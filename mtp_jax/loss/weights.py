"""How much each head's loss counts, at a step.

Axes: N heads, K rows of a table.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.config import LossConfig, Table


def head_weights(cfg: LossConfig, n: int) -> jax.Array:
    """Weight of each head's mean loss, float32 [N]; all 1 is the paper's sum."""
    if cfg.head_weights:
        return jnp.array(cfg.head_weights, jnp.float32)
    return cfg.head_decay ** jnp.arange(n, dtype=jnp.float32)


def weights_at(cfg: LossConfig, n: int, steps: int, step: jax.Array) -> jax.Array:
    """Weight of each head's mean loss at a step, float32 [N].

    Args:
      cfg: of the run.
      n: heads.
      steps: of the run.
      step: steps done before, int32.
    """
    weight_N = head_weights(cfg, n)
    table = cfg.weights(n, steps)
    return weight_N if table.constant(1.0) else weight_N * at_step(table, step)


def at_step(table: Table, step: jax.Array) -> jax.Array:
    """The numbers of a table at a step, float32 [N]."""
    rows_KN = jnp.array(table.rows, jnp.float32)
    if len(table.steps) == 1:
        return rows_KN[0]
    starts_K = jnp.array(table.steps, jnp.int32)
    last = len(table.steps) - 1
    k = jnp.clip(jnp.sum(starts_K <= step) - 1, 0, last - 1)
    length = (starts_K[k + 1] - starts_K[k]).astype(jnp.float32)
    done = jnp.clip((step - starts_K[k]).astype(jnp.float32) / length, 0.0, 1.0)
    # This form is exact at both ends.
    return rows_KN[k] * (1.0 - done) + rows_KN[k + 1] * done


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepWeights:
    """The weights of one step."""

    weight_N: jax.Array  # of each target of a head, float32
    extra_J: jax.Array | None = None  # of each extra target of the one head, float32
    pull_N: jax.Array | None = None  # of a head's gradient into what it reads, float32
    active_N: jax.Array | None = None  # False: the head does no work, bool
    learns_N: jax.Array | None = None  # False: its parameters stand still, bool
