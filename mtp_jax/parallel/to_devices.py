"""Puts rows of a host onto the devices, as arrays of the global batch.

Axes: A microbatches, M rows of a microbatch, S tokens of a row.
"""

import jax
import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import spec


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """The sharding of batch arrays [A, M, S]: rows are split, microbatches are not."""
    return jax.NamedSharding(mesh, spec(None, "batch", None))


def rows_of_process(
    sharding: jax.sharding.Sharding, batch_size: int, accumulation: int = 1
) -> np.ndarray:
    """Rows of the global batch that devices of this process hold, sorted, int64.

    Row r of the global batch is at [r // M, r % M] of the arrays on the devices, which
    are [accumulation, M, S] with M = batch_size / accumulation: microbatches first.

    Args:
      sharding: the sharding of such an array; S is not split.
      batch_size: rows of the global batch.
      accumulation: microbatches, a divisor of the batch size.

    Raises:
      UserError: the rows of a microbatch do not split evenly over the devices.
    """
    shape = (accumulation, batch_size // accumulation, 1)
    try:
        places = sharding.addressable_devices_indices_map(shape)
    except ValueError:
        raise UserError(
            f"config.data.batch_size ({batch_size}) / config.train.accumulation "
            f"({accumulation}) = {shape[1]} rows do not split evenly over the replica, "
            "vocab and fsdp axes of the mesh; give a multiple of their product."
        ) from None
    numbers = np.arange(batch_size).reshape(shape)
    return np.unique(np.concatenate([numbers[i].ravel() for i in places.values()]))


def place_rows(
    batch: dict[str, np.ndarray],
    rows: np.ndarray,
    sharding: jax.sharding.Sharding,
    batch_size: int,
    accumulation: int = 1,
) -> dict[str, jax.Array]:
    """Makes global arrays [A, M, S] of this process's rows of a global batch.

    Args:
      batch: arrays [len(rows), S].
      rows: their numbers in the global batch, from `rows_of_process`.
      sharding: the sharding of the global arrays.
      batch_size: rows of the global batch.
      accumulation: A, microbatches.
    """
    here = np.full(batch_size, -1)
    here[rows] = np.arange(len(rows))
    here_AM = here.reshape(accumulation, -1)

    def place(x: np.ndarray) -> jax.Array:
        shape = (*here_AM.shape, *x.shape[1:])

        def local(index: tuple[slice, ...] | None) -> np.ndarray:
            return x[here_AM[index[:2]]] if index else x[here_AM]

        return jax.make_array_from_callback(shape, sharding, local)

    return {name: place(x) for name, x in batch.items()}
