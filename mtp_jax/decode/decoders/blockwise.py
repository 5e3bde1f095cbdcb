"""Self-speculative decoding: heads 2..n draft, head 1 verifies (arXiv:1811.03115).

A forward pass reads the last committed token and the n - 1 drafts after it. Head 1 says
at each of them what really comes next; the drafts up to the first wrong one are right,
and so is what head 1 says after them. Verifying and drafting are one forward pass
(section 4 there). The text is that of `plain`, in fewer forward passes.

What head 1 says may be its most likely token, or one drawn from its law: a draft is
right if it is the token that was drawn, so texts have the law of `plain`'s.

Axes: N heads, M = N - 1 drafts, B batch, D model width.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders import passes
from mtp_jax.decode.decoders.sampling import Sampler
from mtp_jax.decode.decoders.state import DecodeState, choose, predict
from mtp_jax.parallel.sharding import spec


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Drafts are the heads' most likely tokens; exact, greedy or sampled."""

    lossy: ClassVar[bool] = False

    def heads(self, n: int) -> int:
        """All of them."""
        return n

    def width(self, n: int) -> int:
        """The last committed token and the drafts."""
        return n

    def begin(
        self, model: DecodeModel, state: DecodeState, heads_BND: jax.Array
    ) -> DecodeState:
        """Commits what head 1 says at the prompt's end, and drafts with the others."""
        return passes.begin(self, model, state, heads_BND)

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Verifies drafts, commits the right ones and one more, and drafts again."""
        drafts_BM = state.carry[:, : depth - 1]

        def verify(logits_BNV, sampler):
            predicted_BN = choose(state, logits_BNV, sampler)
            return predicted_BN, self.accepted(drafts_BM, predicted_BN)

        return passes.step(self, model, state, drafts_BM, verify)

    def draft(
        self,
        model: DecodeModel,
        state: DecodeState,
        heads_BMD: jax.Array,
        sampler: Sampler,
    ) -> jax.Array:
        """The most likely token of each drafting head, int32 [B, M]."""
        del state, sampler
        # Indexing a batch of one row may forget that it is split like any other.
        return jax.sharding.reshard(predict(model, heads_BMD), spec("batch", None))

    def accepted(self, drafts_BM: jax.Array, predicted_BN: jax.Array) -> jax.Array:
        """How many drafts are right: those before the first that head 1 did not say."""
        right_BM = (drafts_BM == predicted_BN[:, :-1]).astype(jnp.int32)
        return jnp.sum(jnp.cumprod(right_BM, axis=1), axis=1)
