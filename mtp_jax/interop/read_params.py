"""Parameters from the tensors of a file, of each device its part alone."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mtp_jax.interop.places import Place, from_file
from mtp_jax.interop.sources import Source


def read_params(abstract: Any, places: Iterable[Place], source: Source) -> Any:
    """The tree of parameters with the shapes, dtypes and shardings of `abstract`.

    A host reads of each tensor what its devices hold.

    Args:
      abstract: nested dicts of `jax.ShapeDtypeStruct` with shardings on a mesh.
      places: of every entry of every parameter.
      source: the tensors.
    """
    entries: dict[tuple[str, ...], dict[int | None, Place]] = {}
    for place in places:
        entries.setdefault(place.path, {})[place.entry] = place

    def read(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        of_leaf = entries[tuple(key.key for key in path)]

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            if None in of_leaf:
                found = _part(of_leaf[None], index, source)
            else:
                numbers = range(*index[0].indices(like.shape[0]))
                found = np.stack(
                    [_part(of_leaf[i], index[1:], source) for i in numbers]
                )
            return found.astype(like.dtype)

        return jax.make_array_from_callback(like.shape, like.sharding, part)

    return jax.tree.map_with_path(read, abstract)


def _part(place: Place, index: tuple[slice, ...], source: Source) -> np.ndarray:
    """A part of an entry of a parameter, by an index of its axes."""
    bounds = [i.indices(n)[:2] for i, n in zip(index, place.shape, strict=True)]
    inputs = place.inputs
    if place.form == "table":
        rows, columns = (slice(*b) for b in bounds)
        return from_file(place, source.read(place.name, rows, columns))
    offset = place.rows[0] if place.rows else 0
    rows = _flat(bounds[inputs:], place.shape[inputs:], offset)
    columns = _flat(bounds[:inputs], place.shape[:inputs], 0)
    return from_file(place, source.read(place.name, rows, columns))


def _flat(bounds: list[tuple[int, int]], shape: tuple[int, ...], offset: int) -> slice:
    """The entries of some axes as one, of which only the first may be a part."""
    if not shape:
        return slice(None)
    whole = [(0, n) for n in shape[1:]]
    assert bounds[1:] == whole, (bounds, shape)  # the mesh splits no other axis
    each = math.prod(shape[1:])
    first, end = bounds[0]
    return slice(offset + first * each, offset + end * each)
