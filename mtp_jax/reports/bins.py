"""Columns of numbers cut into bins, for curves.

Axes: R points, K bins.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Binned:
    """A curve of at most K points: of each bin the mean, and what it lies between."""

    x: np.ndarray  # float64 [K], the mean of its records'
    mean: np.ndarray
    low: np.ndarray  # the smallest
    high: np.ndarray  # the largest


def binned(x: np.ndarray, y: np.ndarray, bins: int) -> Binned:
    """Cuts a curve into bins of equal width; numbers that are not finite are left out.

    Args:
      x: float64 [R], in any order; points whose x is not finite are left out.
      y: float64 [R].
      bins: most points of the result; fewer points stay as they are.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[finite], kind="stable")
    x, y = x[finite][order], y[finite][order]
    if len(x) <= bins:
        return Binned(x, y, y, y)
    width = (x[-1] - x[0]) / bins or 1.0
    which = np.minimum((x - x[0]) // width, bins - 1)
    starts = np.flatnonzero(np.diff(which, prepend=-1.0))
    counts = np.diff(np.append(starts, len(x)))
    return Binned(
        np.add.reduceat(x, starts) / counts,
        np.add.reduceat(y, starts) / counts,
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
    )
