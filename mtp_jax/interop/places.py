"""Where the tensors of a file have their places in our tree of parameters.

A table of places serves both directions: who imports asks `from_file`, who exports
`to_file`. Files hold matrices as outputs by inputs, and vectors; of a stack of layers
each entry has tensors of its own.

Axes: D model width, H query heads, G key-value heads, K head width, F feed-forward
width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.errors import UserError

# table: as it is. vector: its axes as one. matrix: outputs by inputs.
Form = Literal["table", "vector", "matrix"]
# Axes of inputs of our matrices, the first ones; 1 where not named.
_INPUT_AXES = {"w_o": 2}


@dataclasses.dataclass(frozen=True)
class Place:
    """A tensor of a file, or some rows of it, and the parameter that it is."""

    name: str  # of the tensor
    path: tuple[str, ...]  # of the parameter in our tree, ("trunk", "mlp", "w_gate")
    entry: int | None  # of a stack, its first axis; None: the whole parameter
    shape: tuple[int, ...]  # of the entry, in our order of axes
    form: Form
    # Rows of the tensor, where it holds several parameters: first and end.
    rows: tuple[int, int] | None = None
    # Rows of each head in pairs (2j, 2j + 1) that turn together, as Meta has them; ours
    # are (j, j + K/2), as Hugging Face has them.
    interleaved: bool = False

    @property
    def inputs(self) -> int:
        """The number of leading axes of inputs."""
        return _INPUT_AXES.get(self.path[-1], 1) if self.form == "matrix" else 0

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of the tensor, or of those of its rows."""
        if self.form == "table":
            return self.shape
        if self.form == "vector":
            return (math.prod(self.shape),)
        inputs = self.inputs
        return (math.prod(self.shape[inputs:]), math.prod(self.shape[:inputs]))


@dataclasses.dataclass(frozen=True)
class Names:
    """How a format calls the tensors of a model.

    `layer` has names within a layer by our paths, as {"mlp/w_gate": "mlp.gate_proj"};
    several of ours under one name lie in it one after another, in the order of the
    table. `{}` in `layers` is the number of a layer of the ordinary model, whose last
    one is head 1, and in `heads` that of a further head, from 0 on.
    """

    embedding: str
    norm: str  # with {}: one of each head, from 0 on
    unembedding: str
    layers: str
    layer: Mapping[str, str]
    heads: str | None = None
    interleaved: bool = False  # queries and keys are in Meta's order


def places_of(
    cfg: ModelConfig, names: Names, expected: Mapping[str, Any]
) -> list[Place]:
    """The places of all tensors of a model with parallel heads of one layer each.

    Args:
      cfg: of the model.
      names: of the format.
      expected: the tree of our parameters, anything with shapes, as
        `jax.eval_shape` of `model_builder(cfg)[0]` gives it.

    Raises:
      UserError: the format has no place for heads of this kind or number.
    """
    n = cfg.n_future_tokens
    _refuse_heads(cfg, names)
    found = [
        Place(names.embedding, ("w_embedding",), None, _shape(expected["w_embedding"]),
              "table"),
    ]  # fmt: skip
    if not cfg.tie_embeddings:
        shape = _shape(expected["w_unembedding"])
        place = Place(names.unembedding, ("w_unembedding",), None, shape, "table")
        found.append(place)
    own = cfg.heads.norm == "own"
    for i in range(n if own else 1):
        entry = i if own else None
        shape = _shape(expected["norm"])[1 if own else 0 :]
        found.append(Place(names.norm.format(i), ("norm",), entry, shape, "vector"))
    trunk = cfg.num_trunk_layers
    for i in range(trunk):
        prefix = names.layers.format(i)
        found += _of_layer(cfg, names, prefix, ("trunk",), i, expected["trunk"])
    for i in range(n):
        last = names.layers.format(trunk)
        prefix = last if i == 0 else (names.heads or "").format(i - 1)
        found += _of_layer(cfg, names, prefix, ("heads",), i, expected["heads"])
    return found


def _refuse_heads(cfg: ModelConfig, names: Names) -> None:
    n, heads = cfg.n_future_tokens, cfg.heads
    fits = heads.kind == "parallel" and heads.layers == 1 and not heads.markov_rank
    fits = fits and heads.unembedding == "shared"
    if not fits or (n > 1 and names.heads is None):
        raise UserError(
            f"this format holds no {n} {heads.kind} heads as config.heads has them; "
            "keep head 1 of parallel heads alone."
        )
    if heads.norm == "own" and "{}" not in names.norm:
        raise UserError(
            "config.heads.norm is own, and this format has one norm for all heads."
        )


def _of_layer(
    cfg: ModelConfig,
    names: Names,
    prefix: str,
    path: tuple[str, ...],
    entry: int,
    stack: Mapping[str, Any],
) -> list[Place]:
    """The places of a layer; `entry` is the one of the stack that it is."""
    found, at = [], dict.fromkeys(names.layer.values(), 0)
    shared = {x for x in at if list(names.layer.values()).count(x) > 1}
    for ours, theirs in names.layer.items():
        leaf: Any = stack
        for key in ours.split("/"):
            leaf = leaf.get(key) if isinstance(leaf, Mapping) else None
        if leaf is None:
            continue
        key = ours.rpartition("/")[2]
        place = Place(
            prefix + theirs,
            (*path, *ours.split("/")),
            entry,
            _shape(leaf)[1:],
            "matrix" if key.startswith("w_") else "vector",
            interleaved=names.interleaved
            and key in ("w_q", "w_k", "bias_q", "bias_k", "norm_q", "norm_k"),
        )
        if theirs in shared:
            first = at[theirs]
            at[theirs] += place.file_shape[0]
            place = dataclasses.replace(place, rows=(first, at[theirs]))
        found.append(place)
    del cfg
    return found


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)


def from_file(place: Place, rows: np.ndarray) -> np.ndarray:
    """The entry of our parameter of what the file has, of `place.file_shape`.

    A part of it is as good: whole heads of the outputs, and any of the inputs. Then the
    first axis of outputs and that of inputs are shorter.
    """
    if place.form == "table":
        return rows
    if place.form == "vector":
        own = rows.reshape(-1, *place.shape[1:])
        return _half_split(own, axis=own.ndim - 1) if place.interleaved else own
    inputs = place.inputs
    outs, ins = place.shape[inputs + 1 :], place.shape[1:inputs]
    own = rows.reshape(-1, *outs, rows.shape[1] // max(math.prod(ins), 1), *ins)
    if place.interleaved:
        own = _half_split(own, axis=len(outs))
    out_axes = len(outs) + 1
    return np.moveaxis(
        own, tuple(range(out_axes, own.ndim)), tuple(range(own.ndim - out_axes))
    )


def to_file(place: Place, entry: np.ndarray) -> np.ndarray:
    """What the file has for an entry of our parameter: `place.file_shape`."""
    if place.form == "table":
        return entry
    own = entry
    if place.form == "matrix":
        inputs = place.inputs
        own = np.moveaxis(entry, tuple(range(inputs)), tuple(range(-inputs, 0)))
    if place.interleaved:
        axis = own.ndim - 1 if place.form == "vector" else 1
        own = _interleave(own, axis)
    return np.ascontiguousarray(own).reshape(place.file_shape)


def _half_split(x: np.ndarray, axis: int) -> np.ndarray:
    """Along an axis of K, from pairs (2j, 2j + 1) to pairs (j, j + K/2)."""
    order = np.arange(x.shape[axis]).reshape(-1, 2).T.reshape(-1)
    return np.take(x, order, axis)


def _interleave(x: np.ndarray, axis: int) -> np.ndarray:
    """Along an axis of K, from pairs (j, j + K/2) to pairs (2j, 2j + 1)."""
    order = np.arange(x.shape[axis]).reshape(2, -1).T.reshape(-1)
    return np.take(x, order, axis)


def check_names(
    places: Iterable[Place], there: Mapping[str, tuple[int, ...]], where: str
) -> list[str]:
    """Refuses tensors that are missing, of another shape, or that nothing explains.

    Args:
      places: of the model.
      there: shapes of the tensors by name.
      where: the file or folder, for errors.

    Returns:
      The names that are used, sorted.

    Raises:
      UserError: naming the tensors.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for place in places:
        shape = place.file_shape
        if place.rows is not None and place.name in wanted:
            shape = (max(wanted[place.name][0], place.rows[1]), *shape[1:])
        elif place.rows is not None:
            shape = (place.rows[1], *shape[1:])
        wanted[place.name] = shape
    if missing := sorted(wanted.keys() - there.keys()):
        raise UserError(f"{where} lacks {_listed(missing)}, which the config asks for.")
    for name, shape in wanted.items():
        if tuple(there[name]) != shape:
            raise UserError(
                f"{where}: {name} is {list(there[name])}, and by the config it is "
                f"{list(shape)}."
            )
    if surplus := sorted(there.keys() - wanted.keys()):
        raise UserError(
            f"{where} has {_listed(surplus)}, which a model of this config does not "
            "have; is it of another architecture?"
        )
    return sorted(wanted)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
