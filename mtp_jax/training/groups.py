"""Groups of parameters by their names: who is trained, how fast, and who waits.

Trees are the nested dicts that `model_builder` makes, or optimizer states that hold
such dicts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtp_jax.config import ModelConfig
from mtp_jax.config.optim import GROUPS

_GROUP_OF = {
    "trunk": "trunk",
    "heads": "heads",
    "w_embedding": "embedding",
    "w_unembedding": "unembedding",
    "w_markov_in": "unembedding",
    "w_markov_out": "unembedding",
    "norm": "norms",
    "lora": "lora",
}


def group_of(name: str) -> str:
    """The group of a parameter of the model, or of a stack of them, by its name."""
    return _GROUP_OF[name]


def trained(params: dict[str, Any], frozen: tuple[str, ...]) -> dict[str, Any]:
    """The parameters whose groups are not frozen."""
    return {k: v for k, v in params.items() if group_of(k) not in frozen}


def together(trained: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """All parameters: those that are trained, and from `params` the frozen ones."""
    return {k: trained.get(k, params[k]) for k in params}


def group_norms(grads: dict[str, Any]) -> dict[str, jax.Array]:
    """The norm of the gradient of each group that has one, float32."""
    found = {}
    for group in GROUPS:
        of_group = {k: v for k, v in grads.items() if group_of(k) == group}
        if of_group:
            found[group] = optax.tree.norm(of_group)
    return found


def multiplied(tree: dict[str, Any], factors: dict[str, float]) -> dict[str, Any]:
    """A tree of parameters, those of some groups times a factor."""

    def times(name: str, of_name: Any) -> Any:
        factor = factors.get(group_of(name))
        if factor is None:
            return of_name
        return jax.tree.map(lambda x: x * factor, of_name)

    return {name: times(name, of_name) for name, of_name in tree.items()}


def unless_waiting(cfg: ModelConfig, active_N: jax.Array, new: Any, old: Any) -> Any:
    """The new tree, but the old one of what belongs to heads that are not active.

    Args:
      cfg: of the model.
      active_N: False for heads that wait or have no weight, bool.
      new, old: parameters, or optimizer states.
    """
    n, heads = cfg.n_future_tokens, cfg.heads
    # In a chain a body also works for the heads that read it, and so does a norm
    # between them.
    read_N = {
        "trunk": lambda: active_N,
        "before": lambda: jax.lax.cummax(active_N.astype(jnp.int32), reverse=True) > 0,
        "after": lambda: jax.lax.cummax(active_N.astype(jnp.int32)) > 0,
    }[heads.wiring.reads]()

    def which(path: tuple[Any, ...]) -> jax.Array | None:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not names:
            return None
        if names[0] == "heads":
            of_bodies = read_N[n - heads.runs(n) :]
            return jnp.any(of_bodies)[None] if heads.shared else of_bodies
        own = {"norm": heads.norm, "w_unembedding": heads.unembedding}
        if own.get(names[0]) != "own":
            return None
        between = names[0] == "norm" and heads.hidden == "after"
        return read_N if between else active_N

    def one(path, new, old):
        active = which(path)
        if active is None:
            return new
        return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map_with_path(one, new, old)


def by_own_norm(
    clip_norm: float, clips: dict[str, float]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Clips the groups of `clips` each by its norm, and the others by their common one.

    The bounds are of norms, as in `optax.clip_by_global_norm`.
    """

    def clip(grads: dict[str, Any]) -> dict[str, Any]:
        def bounded(part: dict[str, Any], bound: float) -> dict[str, Any]:
            return optax.clip_by_global_norm(bound).update(part, optax.EmptyState())[0]

        found: dict[str, Any] = {}
        for group, bound in clips.items():
            found |= bounded(
                {k: v for k, v in grads.items() if group_of(k) == group}, bound
            )
        rest = {k: v for k, v in grads.items() if k not in found}
        found |= bounded(rest, clip_norm)
        return {k: found[k] for k in grads}

    return clip
