"""One token a forward pass: head 1 alone.

Axes: N heads (here 1), B batch, D model width.
"""

import dataclasses
from typing import ClassVar

from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders.passes import read, write_one
from mtp_jax.decode.decoders.state import (
    DecodeState,
    PromptEnd,
    last_token,
    next_logits,
)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Ordinary decoding: what every exact decoder is measured against."""

    lossy: ClassVar[bool] = False

    def heads(self, n: int) -> int:
        """One head: head 1, however many the model has."""
        del n
        return 1

    def width(self, n: int) -> int:
        """One token: the last committed one."""
        del n
        return 1

    def begin(
        self, model: DecodeModel, state: DecodeState, end: PromptEnd
    ) -> DecodeState:
        """Commits head 1's token at the prompt's end."""
        return write_one(state, next_logits(model, state, end.hidden_B1D))

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Reads the last committed token and commits the next."""
        del depth
        out = read(model, state, last_token(state))
        state = dataclasses.replace(state, cache=out.cache)
        return write_one(state, out.logits_BWV)
