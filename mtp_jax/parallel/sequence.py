"""Context parallelism: rows split over devices, and made whole again.

Axes: B batch, T positions, t of them on a device.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mtp_jax.parallel import zigzag
from mtp_jax.parallel.sharding import spec, spec_like, time_parts


def split_time(x_BT: jax.Array) -> jax.Array:
    """Lays whole rows [..., B, T] out over the devices that share them."""
    parts = jax.sharding.get_abstract_mesh().shape["sequence"]
    outer = (None,) * (x_BT.ndim - 2)
    split = spec(*outer, "batch", "time")
    return jax.sharding.reshard(zigzag.deal(x_BT, parts, axis=-1), split)


def whole_time(x_BT: jax.Array) -> jax.Array:
    """Makes rows [B, T] whole; the inverse of `split_time`."""
    parts = time_parts(x_BT)
    whole_BT = jax.sharding.reshard(x_BT, spec("batch", None))
    return zigzag.restore(whole_BT, parts, axis=-1)


def from_next(x_BTX: jax.Array) -> jax.Array:
    """Gives every position what its next one has; 0 at the end of a row. [B, T, ...].

    Where rows are split, only one position of each piece comes from another device.
    """
    parts = time_parts(x_BTX)

    def local(x_btX):
        if parts == 1:
            return _shifted(x_btX, jnp.zeros_like(x_btX[:, :1]))
        # Device p has pieces p and 2 P - 1 - p, and after them come those of its
        # neighbours, but in the middle of the row, whose two pieces are on one device.
        early_btX, late_btX = jnp.split(x_btX, 2, axis=1)
        p, last = lax.axis_index("sequence"), parts - 1
        down = [(i, i - 1) for i in range(1, parts)]
        up = [(i, i + 1) for i in range(last)]
        after_early = lax.ppermute(early_btX[:, :1], "sequence", down)
        after_late = lax.ppermute(late_btX[:, :1], "sequence", up)
        after_early = jnp.where(p == last, late_btX[:, :1], after_early)
        early_btX = _shifted(early_btX, after_early)
        return jnp.concatenate([early_btX, _shifted(late_btX, after_late)], axis=1)

    axes = spec_like(x_BTX, *(None,) * (x_BTX.ndim - 2))
    layout = PartitionSpec(*axes)
    return jax.shard_map(local, in_specs=layout, out_specs=layout)(x_BTX)


def _shifted(x_btX: jax.Array, next_b1X: jax.Array) -> jax.Array:
    return jnp.concatenate([x_btX[:, 1:], next_b1X], axis=1)
