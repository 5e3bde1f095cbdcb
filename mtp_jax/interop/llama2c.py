"""llama2.c's `.bin` files, float32, of both versions (github.com/karpathy/llama2.c).

Seven numbers, then the weights one after another, layers in stacks. Version 1 begins
with a magic number, has a header of 256 bytes and another order. The formats name no
constants: norms have an epsilon of 1e-5, positions a base of 10,000; queries and keys
turn in pairs (2j, 2j + 1).
"""

import math
import pathlib
import struct

import numpy as np

from mtp_jax.config import ModelConfig, RopeConfig
from mtp_jax.errors import UserError
from mtp_jax.interop.fields import told_with
from mtp_jax.interop.meta import NAMES as _META
from mtp_jax.interop.places import Names
from mtp_jax.interop.sources import Arrays

NAMES: Names = _META
_MAGIC = 0x616B3432
_LAYER = {name: x.removesuffix(".weight") for name, x in _META.layer.items()}


def read_llama2c(path: pathlib.Path) -> tuple[ModelConfig, bool, Arrays]:
    """The model of a file, untied; whether its tables are tied; and its tensors.

    Raises:
      UserError: the file cannot be read, is of another version, or not as long as its
        header says.
    """
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if len(data) < 28:
        raise UserError(f"{path} is too short for a file of llama2.c.")
    magic, version = struct.unpack("<Ii", bytes(data[:8]))
    if magic == _MAGIC:
        if version != 1:
            raise UserError(
                f"{path} is of version {version} of llama2.c's format; 0 and 1 are "
                "read, which hold float32."
            )
        numbers = struct.unpack("<7i", bytes(data[8:36]))
        begin, tied = 256, bool(data[36])
    else:
        numbers = struct.unpack("<7i", bytes(data[:28]))
        begin, tied = 28, numbers[5] > 0
    d, d_ff, layers, heads, kv_heads, vocab, context = numbers
    vocab = abs(vocab)
    sizes = (d, d_ff, layers, heads, kv_heads, vocab, context)
    if min(sizes) < 1 or max(sizes) > 2**24 or d % heads:
        raise UserError(f"{path} is no file of llama2.c: its header says {numbers}.")
    with told_with(str(path)):
        model = ModelConfig(
            vocab_size=vocab,
            d_model=d,
            num_layers=layers,
            n_future_tokens=1,
            num_query_heads=heads,
            num_kv_heads=kv_heads,
            d_head=d // heads,
            d_ff=d_ff,
            rope=RopeConfig(context=context),
        )
    order = _order(model, version=int(magic == _MAGIC), tied=tied)
    size = begin + 4 * sum(math.prod(shape) for _, shape in order)
    if len(data) != size:
        raise UserError(
            f"{path} has {len(data)} bytes, and by its header {size}; is it cut?"
        )
    return model, tied, _arrays(path, data, begin, order, layers)


def _order(
    model: ModelConfig, version: int, tied: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """The names of stacks in a file, and their shapes, one after another."""
    d, f, n, k = model.d_model, model.d_ff, model.num_layers, model.d_head
    kv = model.num_kv_heads * k
    table = [("tok_embeddings", (model.vocab_size, d))]
    norms = [("attention_norm", (n, d)), ("ffn_norm", (n, d))]
    attention = [
        ("attention.wq", (n, d, d)), ("attention.wk", (n, kv, d)),
        ("attention.wv", (n, kv, d)), ("attention.wo", (n, d, d)),
    ]  # fmt: skip
    mlp = [
        ("feed_forward.w1", (n, f, d)), ("feed_forward.w2", (n, d, f)),
        ("feed_forward.w3", (n, f, d)),
    ]  # fmt: skip
    last = [] if tied else [("output", (model.vocab_size, d))]
    if version:
        return [*norms, ("norm", (d,)), *table, *attention, *mlp, *last]
    # Cosines and sines, two tables that follow from the positions.
    angles = [("", (model.rope.context, k // 2))] * 2
    return [
        *table, norms[0], *attention, norms[1], *mlp, ("norm", (d,)), *angles, *last,
    ]  # fmt: skip


def _arrays(
    path: pathlib.Path,
    data: np.ndarray,
    begin: int,
    order: list[tuple[str, tuple[int, ...]]],
    layers: int,
) -> Arrays:
    """The tensors by Meta's names, those of stacks one by one."""
    found: dict[str, np.ndarray] = {}
    in_layers = set(_LAYER.values())
    for name, shape in order:
        end = begin + 4 * math.prod(shape)
        values = data[begin:end].view("<f4").reshape(shape)
        begin = end
        if name in in_layers:
            found |= {f"layers.{i}.{name}.weight": values[i] for i in range(layers)}
        elif name:
            found[f"{name}.weight"] = values
    shapes = {name: x.shape for name, x in found.items()}
    return Arrays(str(path), [path], shapes, lambda name: np.array(found[name]))
