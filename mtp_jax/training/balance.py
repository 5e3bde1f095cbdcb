"""How much of each head's gradient the trunk takes, by what it was in steps before.

The heads' gradients into the trunk are measured in the loss (`TokenScores.with_first`,
`squared`), whatever is made of them after that; means of them over steps are state, and
decide the factors of the next step. So one pass over the heads does, a step's factors
do not depend on microbatches or devices, and a run resumes exactly.

Axes: N heads.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import LossConfig
from mtp_jax.loss.metrics import HeadSums


def start_of_balance(loss: LossConfig, n: int) -> dict[str, jax.Array] | None:
    """The means before the first step; None for a balance that needs none."""
    if loss.balance not in ("encodec", "occ"):
        return None
    return {name: jnp.zeros(n) for name in ("norm", "squared", "with_first")}


def updated(
    loss: LossConfig, state: dict[str, jax.Array] | None, sums: HeadSums
) -> dict[str, jax.Array] | None:
    """The means after a step, of heads that had a gradient in it."""
    if state is None:
        return None
    assert sums.squared_N is not None and sums.with_first_N is not None
    found = {
        "norm": jnp.sqrt(sums.squared_N),
        "squared": sums.squared_N,
        "with_first": sums.with_first_N,
    }
    kept = loss.balance_decay
    seen_N = sums.squared_N > 0

    def mean(name: str) -> jax.Array:
        # The first figure of a head is its mean.
        now_N = jnp.where(
            state["squared"] > 0,
            kept * state[name] + (1.0 - kept) * found[name],
            found[name],
        )
        return jnp.where(seen_N, now_N, state[name])

    return {name: mean(name) for name in state}


def factors(loss: LossConfig, state: dict[str, Any], weight_N: jax.Array) -> jax.Array:
    """Factors of the heads' gradients into the trunk, float32 [N].

    encodec: all heads pull by their weights, however large their gradients are
      (arXiv:2210.13438, section 3.4): (w_i / w_1) |g_1| / |g_i|, g being of weighted
      losses.
    occ: in proportion to <g_1, g_i> / |g_i|^2, which is how far a step along g_i lowers
      the loss of head 1 (arXiv:2605.28184), not below 0; their mean over heads 2 to n
      is `balance_budget`, but none is above `balance_most`.

    Head 1 has 1, and so have all before their first step.
    """
    squared_N, seen_N = state["squared"], state["squared"] > 0
    first_N = jnp.arange(len(squared_N)) == 0
    if loss.balance == "encodec":
        norm_N = jnp.maximum(state["norm"], 1e-30)
        share_N = weight_N / jnp.maximum(weight_N[0], 1e-30)
        found_N = share_N * norm_N[0] / norm_N
    else:
        agree_N = jnp.maximum(state["with_first"], 0.0)
        share_N = jnp.where(seen_N, agree_N / jnp.maximum(squared_N, 1e-30), 0.0)
        share_N = jnp.where(first_N, 0.0, share_N)
        total = jnp.maximum(jnp.sum(share_N), 1e-30)
        scale = loss.balance_budget * (len(squared_N) - 1) / total
        found_N = jnp.minimum(scale * share_N, loss.balance_most)
    return jnp.where(seen_N & ~first_N, found_N, 1.0)
