"""A file of arrays that holds data only: a JSON header, and the bytes of the arrays.

Layout: the magic; the length of the header, uint64; the header, UTF-8; the arrays one
after another in C order, little-endian, without gaps. The header tells the dtype of
every leaf and the indices of its shards, from which the place of each in the file
follows. Reading one checks all of that before it makes an array.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import struct
from typing import NoReturn

import jax.numpy as jnp
import numpy as np

_MAGIC = b"mtp_jax shards 1\n"
_PIECE = 1 << 20  # bytes that are hashed while they are in the processor's cache
_LENGTH = struct.Struct("<Q")
_DTYPES = {
    np.dtype(x).name: np.dtype(x)
    for x in (
        *(np.bool_, np.int8, np.int16, np.int32, np.int64),
        *(np.uint8, np.uint16, np.uint32, np.uint64),
        *(np.float16, jnp.bfloat16, np.float32, np.float64),
    )
}

# Start and stop along every axis of the global array.
Index = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The shards of one global array that one process holds."""

    dtype: np.dtype
    shards: dict[Index, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Contents:
    """All that a file holds."""

    setting: str  # what must be the same where it is read
    about: dict[str, float]
    leaves: list[Leaf]


def write(path: pathlib.Path, contents: Contents) -> str:
    """Writes a file; returns its SHA-256 in hexadecimal.

    Raises:
      ValueError: an array has a dtype that files do not hold.
      OSError: it cannot be written.
    """
    leaves = []
    for leaf in contents.leaves:
        if _DTYPES.get(leaf.dtype.name) != leaf.dtype:
            raise ValueError(f"no file of shards holds arrays of {leaf.dtype}")
        leaves.append({"dtype": leaf.dtype.name, "indices": list(leaf.shards)})
    header = {"setting": contents.setting, "about": contents.about, "leaves": leaves}
    text = json.dumps(header, allow_nan=False).encode()
    digest = hashlib.sha256()
    with path.open("wb") as file:
        pieces: list[bytes | memoryview] = [_MAGIC, _LENGTH.pack(len(text)), text]
        arrays = [x for leaf in contents.leaves for x in leaf.shards.values()]
        for piece in (*pieces, *map(_bytes_of, arrays)):
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def read(path: pathlib.Path, sha256: str) -> Contents:
    """The contents of a file, if it is whole.

    Args:
      path: of the file.
      sha256: what `write` returned.

    Raises:
      ValueError: it is altered, cut short or not such a file.
      OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        source = _Source(file)
        if source.take(len(_MAGIC)).tobytes() != _MAGIC:
            raise ValueError(f"{path} is not a file of shards")
        (length,) = _LENGTH.unpack(source.take(_LENGTH.size).tobytes())
        header = _Header.parse(source.take(length).tobytes())
        if sum(map(_num_bytes, header.dtypes, header.indices)) != source.left:
            raise ValueError(f"{path} has not the size that its header tells")
        leaves = [
            Leaf(dtype, {index: source.array(dtype, index) for index in indices})
            for dtype, indices in zip(header.dtypes, header.indices, strict=True)
        ]
        if source.sha256() != sha256:
            raise ValueError(f"{path} is altered")
    return Contents(header.setting, header.about, leaves)


@dataclasses.dataclass(frozen=True)
class _Header:
    """A header whose every part has been checked."""

    setting: str
    about: dict[str, float]
    dtypes: list[np.dtype]  # of every leaf
    indices: list[list[Index]]  # of the shards of every leaf

    @classmethod
    def parse(cls, text: bytes) -> "_Header":
        """Checks a header; raises ValueError if anything in it is not as it must be."""
        try:
            fields = json.loads(text, parse_constant=_refuse)
            setting, about = fields["setting"], fields["about"]
            numbers = [float(x) for x in about.values()]
            dtypes = [_DTYPES[leaf["dtype"]] for leaf in fields["leaves"]]
            indices = [
                [tuple((a, b) for a, b in index) for index in leaf["indices"]]
                for leaf in fields["leaves"]
            ]
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError("the header is not one of a file of shards") from error
        except RecursionError as error:
            raise ValueError("the header is nested too deeply") from error
        ends = [x for of in indices for index in of for pair in index for x in pair]
        pairs = [pair for of in indices for index in of for pair in index]
        if not all(type(x) is int for x in ends) or not isinstance(setting, str):
            raise ValueError("the header has values of other types")
        if any(not 0 <= a <= b for a, b in pairs) or not all(
            map(math.isfinite, numbers)
        ):
            raise ValueError("the header has numbers out of range")
        return cls(setting, dict(zip(about, numbers, strict=True)), dtypes, indices)


class _Source:
    """An open file that is read once, from its beginning to its end."""

    def __init__(self, file: io.FileIO):
        self._file = file
        self._digest = hashlib.sha256()
        self.left = os.fstat(file.fileno()).st_size  # bytes not read yet

    def take(self, size: int) -> np.ndarray:
        """The next bytes, uint8 [size]; raises ValueError where there are fewer."""
        if size > self.left:  # before memory for them is asked for
            raise ValueError(f"the file ends {size - self.left} bytes too early")
        found = np.empty(size, np.uint8)
        view, filled = found.data, 0
        while filled < size:
            count = self._file.readinto(view[filled : filled + _PIECE])
            if not count:
                raise ValueError("the file became shorter")
            self._digest.update(view[filled : filled + count])
            filled += count
        self.left -= size
        return found

    def array(self, dtype: np.dtype, index: Index) -> np.ndarray:
        """The next array, of the shape of a shard at `index`."""
        shape = _shape(index)
        return self.take(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def sha256(self) -> str:
        """SHA-256 of what was read so far, in hexadecimal."""
        return self._digest.hexdigest()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"the header has a number {constant}")


def _shape(index: Index) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in index)


def _num_bytes(dtype: np.dtype, indices: list[Index]) -> int:
    """Bytes that the shards of a leaf take in the file."""
    return dtype.itemsize * sum(math.prod(_shape(index)) for index in indices)


def _bytes_of(x: np.ndarray) -> memoryview:
    """The bytes of an array, without a copy if it is contiguous."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data
