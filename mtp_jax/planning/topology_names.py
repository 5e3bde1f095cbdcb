"""Topologies as libtpu names them, from the names under which clouds sell slices.

v6e-16 is v6e:4x4. The number counts chips of v5e and v6e, and TensorCores, two a chip,
of v4 and v5p: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, "Configurations".
"""

import math
import re

from mtp_jax.errors import UserError

_DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}
_CORES = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}  # that a chip counts as in the number


def topology_of(name: str) -> str:
    """Returns `2xv5p:4x4x4` for `2xv5p-128`; other names as they are.

    Raises:
      UserError: the number tells no shape.
    """
    match = re.fullmatch(r"((?:[1-9]\d*x)?)(v\d\w*?)(?:litepod|lite)?-(\d+)", name)
    if match is None:
        return name
    kind = "v5e" if match[2] == "v5" and "lite" in name else match[2].lower()
    if kind not in _DIMENSIONS:
        return name
    cores, number = _CORES[kind], int(match[3])
    sizes = _shape(number // cores, _DIMENSIONS[kind])
    if sizes is None or number % cores:
        example = f"{kind}:8x12x16" if _DIMENSIONS[kind] == 3 else f"{kind}:4x8"
        raise UserError(
            f"--topology={name}: the number of {kind} counts "
            f"{'TensorCores, two a chip' if cores == 2 else 'chips'}, and {number} "
            f"tells no shape; give the shape, as in {example}."
        )
    return f"{match[1]}{kind}:" + "x".join(map(str, sizes))


def _shape(chips: int, dimensions: int) -> list[int] | None:
    """The most even shape of a power of two of chips; None if there is none."""
    sizes = [1, 1] if dimensions == 2 else [2, 2, 1]
    if chips < math.prod(sizes) or chips & (chips - 1) or (dimensions, chips) == (2, 2):
        return None
    while chips > math.prod(sizes):
        sizes[sizes.index(min(sizes))] *= 2
        sizes.sort()
    return sizes
