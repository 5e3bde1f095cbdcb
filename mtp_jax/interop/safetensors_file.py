"""Tensors of a safetensors file, read where they lie, in part if that is enough.

The format: 8 bytes that say the length of a JSON header, little-endian; the header with
dtype, shape and place of each tensor; the values (github.com/huggingface/safetensors).
bfloat16 is read by NumPy with `ml_dtypes`, which JAX brings along.
"""

import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from mtp_jax.errors import UserError

_DTYPES: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_LONGEST_HEADER = 100_000_000  # bytes, as the reference implementation has it


class SafetensorsFile:
    """An open file; values are mapped into memory and read when they are asked for."""

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the header.

        Raises:
          UserError: there is no such file, it is damaged or cut, or it holds values of
            a dtype that is no weight's.
        """
        self.path = pathlib.Path(path)
        try:
            self._header, self._begin = _header(self.path)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged, or no safetensors file: {error}."
            ) from None
        self.shapes = {k: tuple(v["shape"]) for k, v in self._header.items()}
        self.dtypes = {k: v["dtype"] for k, v in self._header.items()}

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        """Some rows and columns of a tensor, a copy in its dtype."""
        about = self._header[name]
        whole = np.memmap(
            self.path,
            _DTYPES[about["dtype"]],
            mode="r",
            offset=self._begin + about["data_offsets"][0],
            shape=tuple(about["shape"]),
        )
        part = whole[rows] if whole.ndim < 2 else whole[rows, columns]
        return np.array(part)


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The tensors of a file, and where values begin.

    Raises:
      ValueError, RecursionError, KeyError, TypeError, OSError: what is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError("its header does not fit into it")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    begin, ends = 8 + length, 0
    for name, about in tensors.items():
        dtype, (first, end) = about["dtype"], about["data_offsets"]
        if dtype not in _DTYPES:
            raise ValueError(
                f"{name} is of dtype {dtype}; weights are {', '.join(_DTYPES)}"
            )
        taken = math.prod(about["shape"]) * _DTYPES[dtype].itemsize
        if end - first != taken or first < 0:
            raise ValueError(f"{name} takes {end - first} bytes instead of {taken}")
        ends = max(ends, end)
    if begin + ends != size:
        raise ValueError(f"it has {size} bytes, and {begin + ends} are described")
    return tensors, begin
