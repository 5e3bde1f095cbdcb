"""Stacks of heads of which the last ones become others."""

import jax
import jax.numpy as jnp


def with_last(stack: jax.Array, at: int, new: jax.Array) -> jax.Array:
    """A stack [N, ...] whose entries from `at` on are all `new`."""
    count = stack.shape[0] - at
    if count == 0:
        return stack
    others = jnp.stack([new.astype(stack.dtype)] * count)
    others = jax.sharding.reshard(others, jax.typeof(stack).sharding.spec)
    return jnp.concatenate([stack[:at], others])
