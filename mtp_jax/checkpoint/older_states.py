"""States that were saved otherwise, read in their form and brought into today's.

Earlier versions had moments of bfloat16 for bfloat16 parameters, and no float32
weights: their weights go on as they are, with nothing rounded off. Runs that now freeze
other groups of parameters, or teach otherwise, have other arrays than before: moments
of parameters that were frozen begin at 0, those of parameters that are frozen now are
dropped, and so are the means of a balance; a teacher begins as the model.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtp_jax.training.wide import join

Items = dict[str, Any]


def as_saved(wanted: Items, saved: Items) -> Items:
    """The items to read, abstract: those wanted, in the form in which they were saved.

    Args:
      wanted: item name to a tree of `jax.ShapeDtypeStruct`, as today's states are.
      saved: item name to a tree of what was saved.
    """
    if "training" not in wanted or not isinstance(saved.get("training"), dict):
        return wanted
    training, params = dict(wanted["training"]), wanted["params"]
    there = saved["training"]
    if _lacks_rounded_off(wanted, saved):
        del training["rounded_off"]

        def narrow(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            dtype = jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

        training["opt_state"] = jax.tree.map(narrow, training["opt_state"])

    def wide(name: str) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
            params[name],
        )

    names = _names_of_moments(there.get("opt_state"))
    if names and names <= params.keys():
        training["opt_state"] = _with_moments(
            training["opt_state"],
            lambda of: {name: of[name] if name in of else wide(name) for name in names},
        )
    for name in ("balance", "teacher"):
        if name not in there:
            training.pop(name, None)
        elif name not in training:
            training[name] = (
                {field: wide(field) for field in params}
                if name == "teacher"
                else _replicated(there[name], training["step"].sharding)
            )
    return {**wanted, "training": training}


def as_wanted(items: Items, wanted: Items) -> Items:
    """The items that were read, with the arrays and dtypes of today's states."""
    if "training" not in wanted or _form(items) == _form(wanted):
        return items
    # One program: it runs on all processes, and lays arrays out as they are wanted.
    layout = jax.tree.map(lambda x: x.sharding, wanted["training"])

    def widened(training: Items, params: Any) -> Items:
        def zeros(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

        found = {name: training.get(name) for name in wanted["training"]}
        for name in found:
            if found[name] is None and name != "teacher":
                found[name] = zeros(wanted["training"][name])
        there = optax.tree.get_all_with_path(training["opt_state"], "mu")[0][1].keys()
        found["opt_state"] = _with_moments(
            training["opt_state"],
            lambda of, like: {k: of[k] if k in there else zeros(like[k]) for k in like},
            wanted["training"]["opt_state"],
        )
        found["opt_state"] = jax.tree.map(
            lambda x, like: x.astype(like.dtype),
            found["opt_state"],
            wanted["training"]["opt_state"],
        )
        if "teacher" in found and found["teacher"] is None:
            found["teacher"] = join(params, found.get("rounded_off"))
        return found

    widen = jax.jit(widened, out_shardings=layout)
    return {**items, "training": widen(items["training"], items["params"])}


def _with_moments(opt_state: Any, change: Callable[..., Any], *others: Any) -> Any:
    """An optimizer state with other means of gradients and of their squares."""

    def one(state: Any, *others: Any) -> Any:
        if not isinstance(state, optax.ScaleByAdamState):
            return state
        return state._replace(
            mu=change(state.mu, *(other.mu for other in others)),
            nu=change(state.nu, *(other.nu for other in others)),
        )

    def is_adam(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState)

    return jax.tree.map(one, opt_state, *others, is_leaf=is_adam)


def _names_of_moments(tree: Any) -> set[str]:
    """Parameters that have moments in an optimizer state, as Orbax describes it."""
    if isinstance(tree, dict):
        if isinstance(tree.get("mu"), dict):
            return set(tree["mu"])
        parts: Any = tree.values()
    elif isinstance(tree, (list, tuple)):
        parts = [getattr(tree, "mu", None), *tree]
        if isinstance(parts[0], dict):
            return set(parts[0])
    else:
        return set()
    return set().union(*map(_names_of_moments, parts))


def _replicated(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        is_leaf=lambda x: hasattr(x, "shape"),
    )


def _form(items: Items) -> Any:
    """Whatever must be the same: the tree of the training state, and its dtypes."""
    leaves, tree = jax.tree.flatten(items["training"])
    return tree, [x.dtype for x in leaves]


def _lacks_rounded_off(wanted: Items, there: Items) -> bool:
    here, other = (items.get("training", {}) for items in (wanted, there))
    return "rounded_off" in here and "rounded_off" not in other
