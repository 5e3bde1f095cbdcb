"""Self-speculative decoding: heads 2..n draft, head 1 verifies (arXiv:1811.03115).

A forward pass reads the last committed token and the n - 1 drafts after it. Head 1 says
at each of them what really comes next; the drafts up to the first wrong one are right,
and so is what head 1 says after them. Verifying and drafting are one forward pass
(section 4 there). The text is that of `plain`, in fewer forward passes.

Axes: N heads, M = N - 1 drafts, B batch, D model width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.cache import run_head, run_heads_at, run_trunk
from mtp_jax.decoders.state import DecodeState, commit, last_token, say
from mtp_jax.model import LanguageModel
from mtp_jax.sharding import spec


def heads(n: int) -> int:
    """All of them."""
    return n


def begin(
    model: LanguageModel, state: DecodeState, heads_NBD: jax.Array
) -> DecodeState:
    """Commits what head 1 says at the prompt's end, and drafts with the others."""
    said_BN = say(model, jnp.swapaxes(heads_NBD, 0, 1))
    none_B = jnp.zeros_like(state.length_B)
    state = commit(state, said_BN[:, :1], none_B + 1, none_B)
    # Indexing a batch of one row may forget that it is split like any other.
    drafts_BM = jax.sharding.reshard(said_BN[:, 1:], spec("batch", None))
    return dataclasses.replace(state, carry=drafts_BM)


def step(model: LanguageModel, state: DecodeState) -> DecodeState:
    """Verifies the drafts, commits the right ones and one more, and drafts again."""
    drafts_BM = state.carry
    tokens_BN = jnp.concatenate([last_token(state), drafts_BM], axis=1)
    order_1N = jnp.arange(tokens_BN.shape[1])[None]
    positions_BN = state.length_B[:, None] - 1 + order_1N
    trunk_BND, cache = run_trunk(model, tokens_BN, positions_BN, state.cache)
    head_BND, cache = run_head(model, 0, trunk_BND, positions_BN, cache)
    said_BN = say(model, head_BND)
    right_BM = (drafts_BM == said_BN[:, :-1]).astype(jnp.int32)
    agreed_B = jnp.sum(jnp.cumprod(right_BM, axis=1), axis=1)

    drafting = range(1, tokens_BN.shape[1])
    heads_MBD, cache = run_heads_at(
        model, drafting, trunk_BND, positions_BN, agreed_B, cache
    )
    drafts_BM = say(model, jnp.swapaxes(heads_MBD, 0, 1))
    state = dataclasses.replace(state, cache=cache, carry=drafts_BM)
    return commit(state, said_BN, agreed_B + 1, agreed_B)
