"""Float32 weights kept as bfloat16 ones and what rounding took off them.

A step changes a weight by less than bfloat16 can tell from it, so the optimizer must
see weights of float32. The two halves take no more memory than those alone, and the
bfloat16 half is what the model computes with, and what a checkpoint's `params` hold.
"""

from typing import Any

import jax
import jax.numpy as jnp


def split(wide: Any, dtype: str) -> tuple[Any, Any]:
    """Parameters in `dtype`, nearest to float32 ones, and what they lack, int16.

    The second is None for float32. `join` gives the bits of the float32 ones back.
    """
    if dtype == "float32":
        return wide, None
    return jax.tree.map(_rounded, wide), jax.tree.map(_rounded_off, wide)


def join(params: Any, rounded_off: Any) -> Any:
    """The float32 parameters that `split` has split."""
    if rounded_off is None:
        return params
    return jax.tree.map(_joined, params, rounded_off)


def _rounded(x: jax.Array) -> jax.Array:
    """The upper 16 bits of float32, rounded to the nearest, as bfloat16."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = ((bits + 0x8000) >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def _rounded_off(x: jax.Array) -> jax.Array:
    """The lower 16 bits, below 0 where the upper ones were rounded up, int16."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.int16)


def _joined(upper: jax.Array, lower: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(upper, jnp.uint16).astype(jnp.int32) << 16
    return jax.lax.bitcast_convert_type(bits + lower.astype(jnp.int32), jnp.float32)
