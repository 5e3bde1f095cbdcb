"""Low-rank updates of a trunk that is frozen (LoRA, arXiv:2106.09685, section 4).

Each matrix W of the trunk's layers is W + (alpha / r) A B, with A of r columns and B of
r rows. Only those are trained. B begins at 0, so that a run begins with the model as it
is. A checkpoint holds them apart, under `lora`; a restored model has them merged.

Axes: L layers, D model width, H query heads, G key-value heads, K head width, F
feed-forward width, r rank.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import OptimConfig

Tree = Any
# Axes of a matrix after that of the layers: those that are read, and those written.
_AXES = {
    "w_q": ("d", "hk"),
    "w_k": ("d", "gk"),
    "w_v": ("d", "gk"),
    "w_o": ("hk", "d"),
    "w_gate": ("d", "f"),
    "w_up": ("d", "f"),
    "w_down": ("f", "d"),
}


def with_lora(cfg: OptimConfig, params: Tree, key: jax.Array) -> Tree:
    """Parameters and, if the config asks for them, new updates of the trunk.

    A has a variance of one over what is read. Matrices are sharded as those of the
    trunk are.

    Args:
      cfg: of the run.
      params: as `model_builder` makes them.
      key: a typed key.
    """
    if not cfg.lora_rank:
        return params
    return {**params, "lora": _updates(params["trunk"], cfg.lora_rank, key)}


def merged(cfg: OptimConfig, params: Tree) -> Tree:
    """Parameters of the model alone, with the updates of the trunk added to it."""
    if "lora" not in params:
        return params
    scale = cfg.lora_alpha / cfg.lora_rank
    plain = {name: x for name, x in params.items() if name != "lora"}

    def add(tree: Tree, updates: Tree) -> Tree:
        found = dict(tree)
        for name, of_name in updates.items():
            if name not in _AXES:
                found[name] = add(tree[name], of_name)
                continue
            reads, writes = _AXES[name]
            w = tree[name]
            product = jnp.einsum(
                f"l{reads}r,lr{writes}->l{reads}{writes}",
                of_name["a"],
                of_name["b"],
                out_sharding=jax.P(*jax.typeof(w).sharding.spec),
                precision="highest",
            )
            found[name] = w + (scale * product).astype(w.dtype)
        return found

    return {**plain, "trunk": add(plain["trunk"], params["lora"])}


def _updates(tree: Tree, r: int, key: jax.Array) -> Tree:
    """New updates of the matrices in a tree of layers."""
    found = {}
    for name, x in tree.items():
        if isinstance(x, dict):
            found[name] = _updates(x, r, key)
        elif name in _AXES:
            number = list(_AXES).index(name)
            found[name] = _update(x, len(_AXES[name][0]), r, key, number)
    return found


def _update(
    w: jax.Array, reads: int, r: int, key: jax.Array, number: int
) -> dict[str, jax.Array]:
    """A and B of a stack of matrices whose first `reads` axes are read."""
    spec, at = jax.typeof(w).sharding.spec, 1 + reads
    a = jax.random.normal(
        jax.random.fold_in(key, number),
        (*w.shape[:at], r),
        w.dtype,
        out_sharding=jax.P(*spec[:at], None),
    )
    b = jnp.zeros(
        (w.shape[0], r, *w.shape[at:]),
        w.dtype,
        out_sharding=jax.P(spec[0], None, *spec[at:]),
    )
    return {"a": a * math.prod(w.shape[1:at]) ** -0.5, "b": b}
