"""Tensors by name, whatever files they are in: what an import reads from."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.interop.safetensors_file import SafetensorsFile

_INDEX = "model.safetensors.index.json"


class Source(Protocol):
    """Tensors of a model, read in part."""

    where: str  # file or folder, for errors
    files: list[pathlib.Path]  # that the tensors are in

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the tensors by name."""
        ...

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        """Some rows and columns of a tensor, of a float dtype."""
        ...


class Arrays:
    """Tensors in memory, or made when they are asked for."""

    def __init__(
        self,
        where: str,
        files: list[pathlib.Path],
        shapes: Mapping[str, tuple[int, ...]],
        make: Callable[[str], np.ndarray],
    ):
        self.where, self.files, self.shapes = where, files, shapes
        self._make = functools.lru_cache(maxsize=1)(make)  # asked for part by part

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        """Some rows and columns of a tensor."""
        whole = self._make(name)
        return whole[rows] if whole.ndim < 2 else whole[rows, columns]


class Shards:
    """The safetensors files of a folder, one or many with an index."""

    def __init__(self, folder: pathlib.Path):
        """Opens all files and compares them with the index.

        Raises:
          UserError: a file is missing or damaged, or a tensor is not where the index
            says, or in two files.
        """
        self.where = str(folder)
        index = folder / _INDEX
        if index.exists():
            self._files = self._indexed(folder, index)
        else:
            path = folder / "model.safetensors"
            if not path.exists():
                raise UserError(
                    f"{folder} holds no model.safetensors and no {_INDEX}; weights in "
                    "other files are converted by transformers' save_pretrained."
                )
            file = SafetensorsFile(path)
            self._files = dict.fromkeys(file.shapes, file)
        self.shapes = {k: f.shapes[k] for k, f in self._files.items()}
        self.files = sorted({f.path for f in self._files.values()})

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        """Some rows and columns of a tensor, from the file that it is in."""
        return self._files[name].read(name, rows, columns)

    def _indexed(
        self, folder: pathlib.Path, index: pathlib.Path
    ) -> dict[str, SafetensorsFile]:
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(where.values()))
            if any(pathlib.PurePath(name).name != name for name in names):
                raise ValueError("it names files of other folders")
        except (
            AttributeError,
            KeyError,
            OSError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(f"{index} cannot be read: {error}.") from None
        if lost := [name for name in names if not (folder / name).exists()]:
            raise UserError(
                f"{folder} lacks {', '.join(lost[:3])}, of the {len(names)} files that "
                f"{index.name} names."
            )
        files = {name: SafetensorsFile(folder / name) for name in names}
        for name, file in files.items():
            if wrong := sorted(k for k in file.shapes if where.get(k) != name):
                raise UserError(f"{file.path} has {wrong[0]}, and {index.name} not.")
            said = {tensor for tensor, of in where.items() if of == name}
            if lost := sorted(said - file.shapes.keys()):
                raise UserError(
                    f"{file.path} lacks {lost[0]}, which {index.name} says is in it."
                )
        return {tensor: files[name] for tensor, name in where.items()}


class Joined:
    """The tensors of several sources as those of one."""

    def __init__(self, where: str, parts: Sequence[Source]):
        """Opens nothing; `where` is for errors.

        Raises:
          UserError: a tensor is in two of them.
        """
        self.where = where
        self._part_of: dict[str, Source] = {}
        for part in parts:
            if twice := sorted(self._part_of.keys() & part.shapes.keys()):
                raise UserError(f"{part.where} has {twice[0]} once more.")
            self._part_of |= dict.fromkeys(part.shapes, part)
        self.files = [file for part in parts for file in part.files]
        self.shapes = {name: of.shapes[name] for name, of in self._part_of.items()}

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        """Some rows and columns of a tensor, from the source that has it."""
        return self._part_of[name].read(name, rows, columns)
