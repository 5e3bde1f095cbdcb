"""One token a forward pass: head 1 alone.

Axes: N heads (here 1), B batch, D model width.
"""

import dataclasses
from typing import ClassVar

import jax

from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders.passes import read, write_one
from mtp_jax.decode.decoders.state import DecodeState, last_token, next_logits


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
        return write_one(state, next_logits(model, state, heads_BND[:, :1]))

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Reads the last committed token and commits the next."""
        del depth
        seen = read(model, state, last_token(state))
        state = dataclasses.replace(state, cache=seen.cache)
        return write_one(state, seen.logits_BWV)
