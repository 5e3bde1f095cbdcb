"""The most likely next token, one a forward pass: head 1 alone.

Axes: N heads (here 1), B batch, D model width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.cache import run_head, run_trunk
from mtp_jax.decoders.state import DecodeState, commit, last_token, say
from mtp_jax.model import LanguageModel


def heads(n: int) -> int:
    """Head 1, whatever there is."""
    del n
    return 1


def begin(
    model: LanguageModel, state: DecodeState, heads_NBD: jax.Array
) -> DecodeState:
    """Commits what head 1 says at the prompt's end."""
    return _commit(model, state, heads_NBD[0][:, None])


def step(model: LanguageModel, state: DecodeState) -> DecodeState:
    """Reads the last committed token and commits the next."""
    position_B1 = state.length_B[:, None] - 1
    trunk_B1D, cache = run_trunk(model, last_token(state), position_B1, state.cache)
    head_B1D, cache = run_head(model, 0, trunk_B1D, position_B1, cache)
    return _commit(model, dataclasses.replace(state, cache=cache), head_B1D)


def _commit(
    model: LanguageModel, state: DecodeState, head_B1D: jax.Array
) -> DecodeState:
    no_drafts_B = jnp.zeros_like(state.length_B)
    return commit(state, say(model, head_B1D), no_drafts_B + 1, no_drafts_B)
