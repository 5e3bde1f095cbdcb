"""A model with more, fewer or other heads, of the weights of one that is there.

Whatever computes head 1 stays: its layers, in their order, and head 1's norm and
tables. Heads that both models have keep their weights. A model of one head is an
ordinary transformer, which can get heads of any kind: parallel and causal heads have
its last layers as head 1 (arXiv:2404.19737, section 2), anticausal ones are exits
before its end, and linear, residual and serial ones are added on top of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.config.regrow import layers_on_path

Tree = Any
_OWN = {"norm": "norm", "w_unembedding": "unembedding"}  # fields of HeadsConfig


def regrown(before: ModelConfig, after: ModelConfig, tree: Tree, fresh: Tree) -> Tree:
    """The tree of a model `after`, of that of a model `before`.

    Args:
      before: the model that is there.
      after: from `regrown_config` of it.
      tree: its parameters, or moments of all or some of them, by the names of those.
      fresh: likewise of `after`, for what the model before lacks.
    """
    found = dict(fresh)
    path = _path(before, tree)
    if path is not None:
        found |= _split(after, path)
    elif "heads" in tree and _split_alike(before, after):
        found["head_1"] = _first_bodies(after, tree["heads"])
    if "heads" in fresh:
        found["heads"] = _bodies(before, after, tree, fresh, found.pop("head_1", None))
    for name in ("w_embedding", "w_markov_in", "w_markov_out", *_OWN):
        if name in tree and name in fresh:
            found[name] = _kept(before, after, name, tree[name], fresh[name])
    return {name: found[name] for name in fresh}


def _path(cfg: ModelConfig, tree: Tree) -> Tree | None:
    """The layers on the way to head 1 as one stack; None if the tree has not them all.

    A tree of moments lacks the groups that are frozen.
    """
    stacks = [tree["trunk"]] if "trunk" in tree else []
    count = layers_on_path(cfg)
    if not stacks or (count and "heads" not in tree):
        return None
    for body in reversed(range(count // cfg.heads.layers)):
        stacks += _layers_of(cfg, jax.tree.map(lambda x, i=body: x[i], tree["heads"]))
    return _joined(stacks)


def _split_alike(before: ModelConfig, after: ModelConfig) -> bool:
    """True if the same layers are bodies of heads on the way to head 1, in both."""
    counts = layers_on_path(before), layers_on_path(after)
    depths = before.heads.layers, after.heads.layers
    return 0 < counts[0] == counts[1] and depths[0] == depths[1]


def _first_bodies(cfg: ModelConfig, heads: Tree) -> Tree:
    """The bodies of a stack that are on the way to head 1."""
    count = layers_on_path(cfg) // cfg.heads.layers
    return jax.tree.map(lambda x: x[:count], heads)


def _layers_of(cfg: ModelConfig, body: Tree) -> list[Tree]:
    """The layers of a body, each as a stack of one."""
    several = cfg.heads.layers > 1
    parts = [body[f"layer_{i}"] for i in range(cfg.heads.layers)] if several else [body]
    return [jax.tree.map(lambda x: x[None], part) for part in parts]


def _body_of(cfg: ModelConfig, layers: Tree) -> Tree:
    """A body of the layers of a stack, as a stack of one."""
    if cfg.heads.layers == 1:
        return layers
    return {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i : i + 1], layers)
        for i in range(cfg.heads.layers)
    }


def _split(cfg: ModelConfig, path: Tree) -> dict[str, Tree]:
    """The trunk of a path, and as `head_1` those bodies of heads that are on it."""
    count, k = layers_on_path(cfg), cfg.heads.layers
    trunk = cfg.num_trunk_layers
    found = {"trunk": jax.tree.map(lambda x: x[:trunk], path)}
    if count:
        starts = [trunk + i * k for i in reversed(range(count // k))]
        bodies = [
            _body_of(cfg, jax.tree.map(lambda x, at=at: x[at : at + k], path))
            for at in starts
        ]
        found["head_1"] = _joined(bodies)
    return found


def _bodies(
    before: ModelConfig, after: ModelConfig, tree: Tree, fresh: Tree, on_path: Tree
) -> Tree:
    """The stack of bodies of a model: on the path, kept, and fresh ones."""
    parts = [] if on_path is None else [on_path]
    made = 0 if on_path is None else _count(on_path)
    both = before.n_future_tokens > 1 and after.n_future_tokens > 1
    total = _count(fresh["heads"])
    if both and "heads" in tree and before.heads.wiring.reads != "after":
        kept = min(_count(tree["heads"]), total)
        if kept > made:
            parts.append(jax.tree.map(lambda x: x[made:kept], tree["heads"]))
            made = kept
    if made < total:
        parts.append(jax.tree.map(lambda x: x[made:], fresh["heads"]))
    return _joined(parts)


def _kept(
    before: ModelConfig, after: ModelConfig, name: str, there: Any, fresh: Any
) -> Any:
    """A norm or a table of `after`; rows of heads that are new are fresh ones."""
    if name not in _OWN:
        return there
    owners = [getattr(cfg.heads, _OWN[name]) for cfg in (before, after)]
    if owners == ["shared", "shared"]:
        return there
    rows = there if owners[0] == "own" else there[None]
    if owners[1] == "shared":
        return rows[0]
    rows = rows[: after.n_future_tokens]
    return jnp.concatenate([rows, fresh[len(rows) :]])


def _joined(stacks: list[Tree]) -> Tree:
    if len(stacks) == 1:
        return stacks[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)


def _count(stack: Tree) -> int:
    return jax.tree.leaves(stack)[0].shape[0]
