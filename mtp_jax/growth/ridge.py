"""Maps of heads by ridge regression, in closed form.

Head i at t speaks of the token of which head 1 speaks at t + i - 1. So a map from what
the head reads to the normed state of head 1 there is a start that knows what can be
known linearly: min_W sum |W^T f_t - y_t|^2 + r |W|^2, with f the features and y the
state less what the head adds the map's output to. One pass adds up F^T F and F^T Y,
and they are solved in float64.

Where the map is: the matrix of a linear head; the matrix that joins what a serial
module reads, whose layers then begin as the identity; in a transformer layer, whose
other weights are those of the last layer of head 1, first the output of its attention,
then the output of its feed-forward layer.

Axes: B rows, T positions, D model width, X features, J heads that are fitted together.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.growth import forward
from mtp_jax.growth.forward import Pass
from mtp_jax.growth.stacks import with_last
from mtp_jax.growth.text import FitText
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.processes import of_first

Tree = Any
# The states to be said, as multiples of the trunk's: by so much they outweigh what the
# residual stream of a head brings along.
_LOUDER = 4.0
_RIDGE = 1e-3  # r, in means of the diagonal of F^T F


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a fitted matrix is, and its features."""

    path: tuple[str, ...]  # in the body of a head
    # Features [B, T, X], and what the map's output is added to, or None.
    features: Callable[[Pass, int], tuple[jax.Array, jax.Array | None]]


def fit_maps(
    cfg: ModelConfig,
    params: Tree,
    text: FitText,
    first: int,
    token_map_DD: np.ndarray | None = None,
) -> Tree:
    """Parameters whose heads from number `first` on, counted from 0, begin with maps.

    Args:
      cfg: the model.
      params: of it, on the mesh that is set.
      text: that maps are fitted to.
      first: of the heads that get them.
      token_map_DD: what a bias says of the token before (`token_map`), and the maps
        need not.
    """
    params = _silenced(cfg, params, first)
    numbers = range(first, cfg.n_future_tokens)
    # Heads of a chain read what those before them have become.
    groups = (
        [list(numbers)] if cfg.heads.wiring.reads == "trunk" else [[i] for i in numbers]
    )
    for group in groups:
        for place in _PLACES[cfg.heads.kind]:
            params = _fitted(cfg, params, text, place, group, token_map_DD)
    return params


def check_maps(cfg: ModelConfig) -> None:
    """Refuses a model whose heads hold no map.

    Raises:
      UserError: they have no matrix for it, share their weights, or norm what it adds.
    """
    heads = cfg.heads
    if heads.kind not in _PLACES:
        held = ", ".join(_PLACES)
        raise UserError(
            f"a start by ridge needs a matrix to hold its map, which {heads.kind} "
            f"heads have not ({held} heads have); choose another start."
        )
    if heads.shared:
        raise UserError(
            "a start by ridge fits each head by itself, and config.heads.shared gives "
            "all one set of weights; choose another start."
        )
    if heads.wiring.first and cfg.layer.norms == "after":
        raise UserError(
            "a start by ridge fits what a layer adds to its input, and "
            "config.layer.norms=after norms it; choose another start."
        )


def _fitted(
    cfg: ModelConfig,
    params: Tree,
    text: FitText,
    place: _Place,
    group: list[int],
    token_map_DD: np.ndarray | None,
) -> Tree:
    """Parameters with the map of one place in each head of a group."""
    add = _adder(cfg, place, tuple(group), token_map_DD)
    total = summed(add, params, text)
    maps = of_first([solve(*sums) for sums in zip(*total, strict=True)])
    path = place.path
    if place.features is forward.attention_reads or (
        place.features is forward.feed_forward_reads
    ):
        path = (*_last_layer(cfg), *path)
    at = [i if cfg.heads.wiring.first else i - 1 for i in group]
    return {**params, "heads": _with(params["heads"], path, at, maps)}


def summed(add: Callable[[Tree, dict], Any], params: Tree, text: FitText) -> Any:
    """The sums over all batches of a text of what `add` makes of each, float64."""
    total: Any = None
    for batch in text.batches():
        sums = jax.device_get(add(params, batch))
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return total


def solve(gram_XX: np.ndarray, cross_XD: np.ndarray) -> np.ndarray:
    """(G + r I)^-1 C in float64, [X, D], r being a thousandth of G's mean diagonal."""
    size = len(gram_XX)
    ridge = _RIDGE * np.trace(gram_XX) / size + 1e-30
    return np.linalg.solve(gram_XX + ridge * np.eye(size), cross_XD)


def _adder(
    cfg: ModelConfig,
    place: _Place,
    group: tuple[int, ...],
    token_map_DD: np.ndarray | None,
) -> Callable[[Tree, dict], Any]:
    """`f(params, batch) -> (F^T F [J, X, X], F^T Y [J, X, D])`, jitted, float32."""
    _, build = model_builder(cfg)
    product = functools.partial(
        jnp.einsum, precision="highest", out_sharding=jax.P(None, None)
    )
    map_DD = None if token_map_DD is None else jnp.asarray(token_map_DD, jnp.float32)

    @jax.jit
    def add(params: Tree, batch: dict[str, jax.Array]):
        run = Pass.over(build(params), {k: x[0] for k, x in batch.items()})
        level = jnp.sqrt(jnp.mean(jnp.square(run.trunk_BTD.astype(jnp.float32))))
        grams, crosses = [], []
        for head in group:
            said_BTD, known_BT = run.said_later(head)
            if map_DD is not None:
                said_BTD = said_BTD - run.token_before(head) @ map_DD
            features_BTX, base_BTD = place.features(run, head)
            if base_BTD is not None:
                said_BTD = _LOUDER * level * said_BTD - base_BTD.astype(jnp.float32)
            f_BTX = features_BTX.astype(jnp.float32)
            weighed_BTX = f_BTX * known_BT[:, :, None]
            grams.append(product("btx,bty->xy", weighed_BTX, f_BTX))
            crosses.append(product("btx,btd->xd", weighed_BTX, said_BTD))
        return jnp.stack(grams), jnp.stack(crosses)

    return add


def _linear_reads(run: Pass, head: int) -> tuple[jax.Array, None]:
    return forward.unit(run.read_by(head), run.cfg.norm_eps), None


def _serial_reads(run: Pass, head: int) -> tuple[jax.Array, None]:
    return forward.joined(run, head, run.weights(head)), None


_OF_LAYER = (
    _Place(("w_o",), forward.attention_reads),
    _Place(("mlp", "w_down"), forward.feed_forward_reads),
)
_PLACES: dict[str, tuple[_Place, ...]] = {
    "parallel": _OF_LAYER,
    "causal": _OF_LAYER,
    "linear": (_Place(("w_map",), _linear_reads),),
    "serial": (_Place(("w_join",), _serial_reads),),
}


def _last_layer(cfg: ModelConfig) -> tuple[str, ...]:
    """Path of the last layer of a body that is layers."""
    return (f"layer_{cfg.heads.layers - 1}",) if cfg.heads.layers > 1 else ()


def _silenced(cfg: ModelConfig, params: Tree, first: int) -> Tree:
    """Parameters whose layers of heads from `first` on add nothing to their input."""
    if "heads" not in params:
        return params
    at = first if cfg.heads.wiring.first else first - 1

    def silent(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return with_last(x, at, 0 * x[0]) if path[-1].key in _ADDED else x

    heads = jax.tree.map_with_path(silent, params["heads"])
    layout = jax.tree.map(lambda x: x.sharding, params["heads"])
    return {**params, "heads": jax.device_put(heads, layout)}


_ADDED = ("w_o", "bias_o", "w_down", "bias_down")


def _with(tree: Tree, path: tuple[str, ...], at: list[int], maps: list) -> Tree:
    """A stack of bodies with other matrices at a path, of the bodies `at`."""
    if path:
        return {**tree, path[0]: _with(tree[path[0]], path[1:], at, maps)}
    # On the hosts, which have room for it; each has the parts of its devices.
    parts = []
    for shard in tree.addressable_shards:
        new = np.array(shard.data)
        bodies = range(*shard.index[0].indices(len(tree)))
        for body, matrix in zip(at, maps, strict=True):
            if body in bodies:
                part = matrix.reshape(tree.shape[1:])[shard.index[1:]]
                new[body - bodies.start] = part.astype(new.dtype)
        parts.append(jax.device_put(new, shard.device))
    return jax.make_array_from_single_device_arrays(tree.shape, tree.sharding, parts)
