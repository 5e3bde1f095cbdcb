"""The zigzag layout: the positions of a row on each of the devices that share it.

A row is cut into 2 P pieces for P devices, and device p has pieces p and 2 P - 1 - p
(arXiv:2407.21783, section 3.3.2). So every device has the same share of what causal
attention computes, where the last of P pieces in a line would have twice the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np


def pieces(parts: int) -> list[int]:
    """Pieces of the row in the order of the devices, two a device; one in all for 1."""
    if parts == 1:
        return [0]
    return [piece for p in range(parts) for piece in (p, 2 * parts - 1 - p)]


def positions(length: int, parts: int) -> np.ndarray:
    """Positions in the row, in the order of the devices, int32 [length]."""
    cut = np.arange(length, dtype=np.int32).reshape(len(pieces(parts)), -1)
    return cut[pieces(parts)].ravel()


def deal(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """Reorders an axis from the order of the row to that of the devices."""
    return _reorder(x, pieces(parts), axis)


def restore(x: jax.Array, parts: int, axis: int) -> jax.Array:
    """Reorders an axis back to the order of the row; the inverse of `deal`."""
    return _reorder(x, np.argsort(pieces(parts)).tolist(), axis)


def _reorder(x: jax.Array, order: list[int], axis: int) -> jax.Array:
    if len(order) == 1:
        return x
    cut = jnp.split(x, len(order), axis)
    return jnp.concatenate([cut[i] for i in order], axis)
