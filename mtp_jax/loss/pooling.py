"""Devices that pool their tokens in the loss, and split the vocabulary among them.

Along the mesh axis vocab, each device scores the tokens of all of them against its part
of the vocabulary. Its part of the unembedding and of that one's gradient are smaller by
their number, and so are collectives of both; instead, hidden states are gathered, and
their gradients added up.

All functions are of one device, within a `shard_map`. Axes: C tokens of a chunk, P of
them pooled, D model width, V the device's share of the vocabulary among those of the
mesh axis tensor, v its part of that, d its share of the width, w that of all who pool.
"""

from typing import Any

import jax
from jax import lax

from mtp_jax.parallel.sharding import axes_of

_POOL = axes_of("pool")
_OTHERS = tuple(axis for axis in axes_of("embed") if axis not in _POOL)


def pool_size() -> int:
    """The number of devices that pool their tokens."""
    return lax.axis_size(_POOL)


def pooled(tokens: Any) -> Any:
    """The tokens of all that pool them, of arrays [C, ...] of each: [P, ...]."""
    if pool_size() == 1:
        return tokens
    return jax.tree.map(lambda x: lax.all_gather(x, _POOL, tiled=True), tokens)


def of_own_tokens(found: Any) -> Any:
    """The part [C, ...] of arrays [P, ...] that is of the device's own tokens."""
    if pool_size() == 1:
        return found

    def part(x_PX):
        c = x_PX.shape[0] // pool_size()
        return lax.dynamic_slice_in_dim(x_PX, lax.axis_index(_POOL) * c, c)

    return jax.tree.map(part, found)


def added_to_own(x_PX: jax.Array) -> jax.Array:
    """The sum over the parts of the vocabulary, of the own tokens: [C, ...]."""
    if pool_size() == 1:
        return x_PX
    return lax.psum_scatter(x_PX, _POOL, scatter_dimension=0, tiled=True)


def whole_width(w_Vd: jax.Array) -> jax.Array:
    """The device's part of a table, whole in width: [v, D]."""
    w_Vw = lax.all_gather(w_Vd, _OTHERS, axis=1, tiled=True)
    if pool_size() == 1:
        return w_Vw
    return lax.all_to_all(w_Vw, _POOL, split_axis=0, concat_axis=1, tiled=True)


def shared_width(w_vD: jax.Array) -> jax.Array:
    """The sum of what devices have of a table; each keeps its share of it: [V, d]."""
    if pool_size() > 1:
        w_vD = lax.all_to_all(w_vD, _POOL, split_axis=1, concat_axis=0, tiled=True)
    return lax.psum_scatter(w_vD, _OTHERS, scatter_dimension=1, tiled=True)
