"""Self-speculative decoding: heads 2..n draft, head 1 verifies (arXiv:1811.03115).

A forward pass reads the last committed token and the n - 1 drafts after it. Head 1
chooses the next token after each of them; drafts are accepted up to the first that is
not its choice, and its choice after them is committed too. Verifying and drafting are
one forward pass (section 4 there). The text is that of `plain`, in fewer passes.

Head 1's choice is its most likely token, or one drawn from its distribution: a draft is
accepted if it is the token that was drawn, so texts have the distribution of `plain`'s.

Axes: N heads, M = N - 1 drafts, B batch, D model width.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders import passes
from mtp_jax.decode.decoders.sampling import Sampler, most_likely
from mtp_jax.decode.decoders.state import (
    DecodeState,
    PromptEnd,
    choose,
    last_token,
)
from mtp_jax.decode.drafting import Drafting, make_drafts


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Drafts are the heads' most likely tokens; exact, greedy or sampled."""

    lossy: ClassVar[bool] = False

    def heads(self, n: int) -> int:
        """All n heads: head 1 verifies, and the others draft."""
        return n

    def width(self, n: int) -> int:
        """n tokens: the last committed one and n - 1 drafts."""
        return n

    def begin(
        self, model: DecodeModel, state: DecodeState, end: PromptEnd
    ) -> DecodeState:
        """Commits head 1's token at the prompt's end, and drafts with the others."""
        return passes.begin(self, model, state, end)

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Verifies drafts, commits the accepted ones and one more, and drafts again."""
        drafts_BM = state.carry[:, : depth - 1]

        def verify(logits_BNV, sampler):
            chosen_BN = choose(state, logits_BNV, sampler)
            return chosen_BN, self.count_accepted(drafts_BM, chosen_BN)

        return passes.step(self, model, state, drafts_BM, verify)

    def draft(
        self,
        model: DecodeModel,
        state: DecodeState,
        drafting: Drafting,
        sampler: Sampler,
    ) -> jax.Array:
        """The most likely token of each drafting head, int32 [B, M]."""
        del model, sampler

        def best(logits_BMV, head):
            del head
            return most_likely(logits_BMV), None

        return make_drafts(drafting, last_token(state), best)[0]

    def count_accepted(self, drafts_BM: jax.Array, chosen_BN: jax.Array) -> jax.Array:
        """The number of drafts before the first that head 1 did not choose, [B]."""
        equal_BM = (drafts_BM == chosen_BN[:, :-1]).astype(jnp.int32)
        return jnp.sum(jnp.cumprod(equal_BM, axis=1), axis=1)
