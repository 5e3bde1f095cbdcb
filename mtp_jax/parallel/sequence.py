"""Context parallelism: rows split over devices, and made whole again.

Axes: B batch, T positions.
"""

import jax

from mtp_jax.parallel import zigzag
from mtp_jax.parallel.sharding import spec, time_parts


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
