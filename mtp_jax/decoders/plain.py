"""The most likely next token, one a forward pass: head 1 alone.

Axes: N heads (here 1), B batch, D model width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.cache import forward
from mtp_jax.decoders.state import DecodeState, commit, last_token
from mtp_jax.losses import most_likely
from mtp_jax.model import LanguageModel


def heads(n: int) -> int:
    """Head 1, whatever there is."""
    del n
    return 1


def begin(
    model: LanguageModel, state: DecodeState, heads_NBD: jax.Array
) -> DecodeState:
    """Commits what head 1 says at the prompt's end."""
    said_B1 = most_likely(model.logits(heads_NBD[0][:, None], model.unembedding()))
    none_B = jnp.zeros_like(state.length_B)
    return commit(state, said_B1, none_B + 1, none_B)


def step(model: LanguageModel, state: DecodeState) -> DecodeState:
    """Reads the last committed token and commits the next."""
    positions_B1 = state.length_B[:, None] - 1
    heads_NB1D, cache = forward(model, last_token(state), positions_B1, state.cache)
    state = dataclasses.replace(state, cache=cache)
    return begin(model, state, heads_NB1D[:, :, 0])
