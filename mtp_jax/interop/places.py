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
_MARKOV = ("w_markov_in", "w_markov_out")  # of our tree


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
class HeadNames:
    """How a format calls the tensors of heads after the first.

    `{}` is the number of a head, 0 for head 2, and a second one that of a layer or a
    block within it. What is None has no place in the format.
    """

    layers: str  # prefix of a layer; without a second {} a head has one
    kinds: tuple[str, ...] = ("parallel",)  # of `config.heads.kind`
    norm: str | None = None  # of a head whose norm is its own
    unembedding: str | None = None
    map: str | None = None  # of a linear head
    blocks: str | None = None  # prefix of a block of a residual head
    markov: tuple[str, str] | None = None  # tables of the bias, in and out


@dataclasses.dataclass(frozen=True)
class Names:
    """How a format calls the tensors of a model.

    `layer` has names within a layer by our paths, as {"mlp/w_gate": "mlp.gate_proj"};
    several of ours under one name lie in it one after another, in the order of the
    table. `{}` in `layers` is the number of a layer of the ordinary model, which ends
    with head 1.
    """

    embedding: str
    norm: str  # with {}: one of each head, from 0 on
    unembedding: str
    layers: str
    layer: Mapping[str, str]
    heads: HeadNames | None = None
    interleaved: bool = False  # queries and keys are in Meta's order

    def norm_of(self, cfg: ModelConfig, head: int) -> str:
        """The name of the last norm of a head, 0 for head 1."""
        own = cfg.heads.norm == "own" and head > 0
        if own and self.heads is not None and self.heads.norm is not None:
            return self.heads.norm.format(head - 1)
        return self.norm.format(head)

    def unembedding_of(self, cfg: ModelConfig, head: int) -> str:
        """The name of the output matrix of a head, 0 for head 1."""
        if cfg.tie_embeddings:
            return self.embedding
        if head == 0 or cfg.heads.unembedding == "shared":
            return self.unembedding
        assert self.heads is not None and self.heads.unembedding is not None
        return self.heads.unembedding.format(head - 1)

    def layer_prefix(self, cfg: ModelConfig, head: int, layer: int) -> str:
        """The prefix of a layer of a head, both counted from 0."""
        if head == 0:
            return self.layers.format(cfg.num_trunk_layers + layer)
        assert self.heads is not None
        return self.heads.layers.format(head - 1, layer)


def places_of(
    cfg: ModelConfig, names: Names, expected: Mapping[str, Any]
) -> list[Place]:
    """The places of all tensors of a model.

    Args:
      cfg: of the model.
      names: of the format.
      expected: the tree of our parameters, anything with shapes, as
        `jax.eval_shape` of `model_builder(cfg)[0]` gives it.

    Raises:
      UserError: the format has no place for heads of this kind or number.
    """
    n, heads = cfg.n_future_tokens, cfg.heads
    _refuse_heads(cfg, names)

    def place(name: str, key: str, entry: int | None, form: Form) -> Place:
        shape = _shape(expected[key])
        return Place(name, (key,), entry, shape[entry is not None :], form)

    found = [place(names.embedding, "w_embedding", None, "table")]
    each = [(i, i) for i in range(n)]
    if not cfg.tie_embeddings:
        for i, entry in each if heads.unembedding == "own" else [(0, None)]:
            name = names.unembedding_of(cfg, i)
            found.append(place(name, "w_unembedding", entry, "table"))
    for i, entry in each if heads.norm == "own" else [(0, None)]:
        found.append(place(names.norm_of(cfg, i), "norm", entry, "vector"))
    for i in range(cfg.num_trunk_layers):
        prefix = names.layers.format(i)
        found += _of_layer(names, prefix, ("trunk",), i, expected["trunk"])
    for i in range(0 if heads.wiring.first else 1, n):
        found += _of_body(cfg, names, i, expected["heads"])
    if heads.markov_rank and n > 1:
        assert names.heads is not None and names.heads.markov is not None
        for name, key in zip(names.heads.markov, _MARKOV, strict=True):
            found.append(place(name, key, None, "table"))
    return found


def _refuse_heads(cfg: ModelConfig, names: Names) -> None:
    n, heads, of = cfg.n_future_tokens, cfg.heads, names.heads
    if n == 1:
        return
    fits = of is not None and heads.kind in of.kinds and not heads.shared
    if of is not None and heads.wiring.layered:
        fits = fits and (heads.layers == 1 or of.layers.count("{}") == 2)
    if of is not None and heads.markov_rank:
        fits = fits and of.markov is not None
    if of is not None and heads.unembedding == "own":
        fits = fits and of.unembedding is not None
    if not fits:
        raise UserError(
            f"this format holds no {n} {heads.kind} heads as config.heads has them; "
            "keep head 1 alone."
        )
    assert of is not None
    if heads.norm == "own" and "{}" not in names.norm and of.norm is None:
        raise UserError(
            "config.heads.norm is own, and this format has one norm for all heads."
        )


def _of_body(
    cfg: ModelConfig, names: Names, head: int, bodies: Mapping[str, Any]
) -> list[Place]:
    """The places of a head besides its norm and table, 0 for head 1."""
    heads, entry = cfg.heads, head - (0 if cfg.heads.wiring.first else 1)
    if heads.wiring.layered:
        found: list[Place] = []
        path: tuple[str, ...]
        for i in range(heads.layers):
            path, stack = ("heads",), bodies
            if heads.layers > 1:
                path, stack = ("heads", f"layer_{i}"), bodies[f"layer_{i}"]
            prefix = names.layer_prefix(cfg, head, i)
            found += _of_layer(names, prefix, path, entry, stack)
        return found
    of = names.heads
    assert of is not None
    if heads.kind == "linear":
        parts = {"w_map": (of.map or "").format(head - 1)}
    else:
        parts = {}
        for i in range(heads.layers):
            prefix = (of.blocks or "").format(head - 1, i)
            parts |= {f"w_{i}": f"{prefix}weight", f"bias_{i}": f"{prefix}bias"}
    return [
        Place(name, ("heads", key), entry, _shape(bodies[key])[1:], _form(key))
        for key, name in parts.items()
    ]


def _of_layer(
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
            _form(key),
            interleaved=names.interleaved
            and key in ("w_q", "w_k", "bias_q", "bias_k", "norm_q", "norm_k"),
        )
        if theirs in shared:
            first = at[theirs]
            at[theirs] += place.file_shape[0]
            place = dataclasses.replace(place, rows=(first, at[theirs]))
        found.append(place)
    return found


def _form(key: str) -> Form:
    return "matrix" if key.startswith("w_") else "vector"


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
    """The tensor, or its rows, of an entry of our parameter: `place.file_shape`."""
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
