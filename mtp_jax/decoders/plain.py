"""One token a forward pass: head 1 alone.

Axes: N heads (here 1), B batch, D model width.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtp_jax.cache import chain, run_head, run_trunk
from mtp_jax.decode_model import DecodeModel
from mtp_jax.decoders.sampling import Draws
from mtp_jax.decoders.state import (
    DecodeState,
    choose,
    commit,
    last_token,
    next_logits,
)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Ordinary decoding: what every exact decoder is measured against."""

    lossy: ClassVar[bool] = False

    def heads(self, n: int) -> int:
        """Head 1, whatever there is."""
        del n
        return 1

    def width(self, n: int) -> int:
        """The last committed token."""
        del n
        return 1

    def begin(
        self, model: DecodeModel, state: DecodeState, heads_BND: jax.Array
    ) -> DecodeState:
        """Commits what head 1 says at the prompt's end."""
        return _commit(model, state, heads_BND[:, :1])

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Reads the last committed token and commits the next."""
        del depth
        new = chain(last_token(state), state.length_B - 1)
        trunk_B1D, cache = run_trunk(model, new, state.cache)
        head_B1D, cache = run_head(model, 0, trunk_B1D, new, cache)
        return _commit(model, dataclasses.replace(state, cache=cache), head_B1D)


def _commit(model: DecodeModel, state: DecodeState, head_B1D: jax.Array) -> DecodeState:
    draws = Draws(state.chance, state.length_B)
    token_B1 = choose(state, next_logits(model, state, head_B1D), draws)
    state = dataclasses.replace(state, chance=draws.after())
    no_drafts_B = jnp.zeros_like(state.length_B)
    return commit(state, token_B1, no_drafts_B + 1, no_drafts_B)
