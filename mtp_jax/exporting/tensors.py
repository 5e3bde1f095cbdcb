"""Safetensors files: written in shards, read again, compared.

Layout: https://github.com/huggingface/safetensors; the index of several files is that
of transformers.
"""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from mtp_jax.errors import RunFailed, UserError

Arrays = dict[str, np.ndarray]
_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def library() -> Any:
    """The package safetensors.

    Raises:
      UserError: it is not installed.
    """
    try:
        import safetensors
    except ImportError:
        raise UserError(
            "this format needs the package safetensors; pip install 'mtp-jax[interop]'."
        ) from None
    return safetensors


def write(folder: pathlib.Path, arrays: Arrays, shard_bytes: int) -> None:
    """Writes model.safetensors, or files of at most so many bytes and their index."""
    shards: list[Arrays] = [{}]
    for name, x in arrays.items():
        if shards[-1] and sum(y.nbytes for y in shards[-1].values()) + x.nbytes > (
            shard_bytes
        ):
            shards.append({})
        shards[-1][name] = x
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", arrays)
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard)
        where |= dict.fromkeys(shard, name)
    sizes = {
        "total_parameters": sum(x.size for x in arrays.values()),
        "total_size": sum(x.nbytes for x in arrays.values()),
    }
    index = json.dumps({"metadata": sizes, "weight_map": where}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index + "\n")


def read(folder: pathlib.Path) -> Arrays:
    """The tensors that `write` put into a folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _read_file(folder / "model.safetensors")
    names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
    found: Arrays = {}
    for name in names:
        found |= _read_file(folder / name)
    return found


def compare(where: pathlib.Path, written: Arrays, found: Arrays) -> None:
    """Raises RunFailed unless two sets of tensors are the same, to the bit."""
    other = written.keys() ^ found.keys()
    other |= {
        name
        for name in written.keys() & found.keys()
        if written[name].shape != found[name].shape
        or written[name].tobytes() != found[name].tobytes()
    }
    if other:
        shown = ", ".join(sorted(other)[:5])
        raise RunFailed(f"{where} holds other tensors than were written: {shown}")


def _write_file(path: pathlib.Path, arrays: Arrays) -> None:
    library()
    from safetensors.numpy import save_file

    contiguous = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def _read_file(path: pathlib.Path) -> Arrays:
    return {
        name: np.frombuffer(x["data"], _TYPES[x["dtype"]]).reshape(x["shape"])
        for name, x in library().deserialize(path.read_bytes())
    }
