"""States that earlier versions saved, read in their form and brought into today's.

Those of bfloat16 parameters had moments of bfloat16 too, and no float32 weights: their
weights go on as they are, with nothing rounded off.
"""

from typing import Any

import jax
import jax.numpy as jnp

Items = dict[str, Any]


def as_saved(wanted: Items, saved: Items) -> Items:
    """The items to read, abstract: those wanted, in the form in which they were saved.

    Args:
      wanted: item name to a tree of `jax.ShapeDtypeStruct`, as today's states are.
      saved: item name to a tree of what was saved.
    """
    if not _lacks_rounded_off(wanted, saved):
        return wanted
    training = {k: v for k, v in wanted["training"].items() if k != "rounded_off"}

    def narrow(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    training["opt_state"] = jax.tree.map(narrow, training["opt_state"])
    return {**wanted, "training": training}


def as_wanted(items: Items, wanted: Items) -> Items:
    """The items that were read, with the arrays and dtypes of today's states."""
    if not _lacks_rounded_off(wanted, items):
        return items
    # One program: it runs on all processes, and lays arrays out as they are wanted.
    layout = jax.tree.map(lambda x: x.sharding, wanted["training"])

    def widened(training: Items) -> Items:
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), wanted["training"]["rounded_off"]
        )
        opt_state = jax.tree.map(
            lambda x, like: x.astype(like.dtype),
            training["opt_state"],
            wanted["training"]["opt_state"],
        )
        return {**training, "opt_state": opt_state, "rounded_off": zero}

    training = jax.jit(widened, out_shardings=layout)(items["training"])
    return {**items, "training": training}


def _lacks_rounded_off(wanted: Items, there: Items) -> bool:
    here, other = (items.get("training", {}) for items in (wanted, there))
    return "rounded_off" in here and "rounded_off" not in other
