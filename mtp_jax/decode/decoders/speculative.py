"""Speculative sampling with the model's own heads (arXiv:2211.17192, algorithm 1).

Head i draws a draft from its own distribution q. Head 1, with distribution p, accepts
it with probability min(1, p / q), and at the first rejection draws from the residual,
max(0, p - q), instead. Texts have exactly the distribution of `plain`'s, whatever the
heads propose. All that the proof there asks for is that each draft was drawn from its
q, given the text before it.

Axes: N heads, M = N - 1 drafts, B batch, D model width, V vocabulary.
"""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from mtp_jax.decode.cache import at_slot
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders import passes
from mtp_jax.decode.decoders.sampling import Sampler
from mtp_jax.decode.decoders.state import (
    DecodeState,
    Drafter,
    PromptEnd,
    last_token,
    target_probs,
)
from mtp_jax.decode.drafting import Drafting, make_drafts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """Tokens that heads 2..n propose."""

    token_BM: jax.Array  # int32
    probs_BMV: jax.Array  # distribution of each, given those before it, float32


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Drafts are drawn from the heads' laws; exact at any temperature."""

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
        return step(self, model, state, depth)

    def draft(
        self,
        model: DecodeModel,
        state: DecodeState,
        drafting: Drafting,
        sampler: Sampler,
    ) -> Drafts:
        """Draws a token from each drafting head's distribution."""
        del model

        def draw(logits_BMV, head):
            del head
            # Tokens that the text repeats are not penalized: any proposal will do.
            probs_BMV = target_probs(state, logits_BMV)
            return choose_from(probs_BMV, state, sampler), probs_BMV

        return Drafts(*make_drafts(drafting, last_token(state), draw))

    def accept(
        self, p_BNV: jax.Array, q_BMV: jax.Array, drafts_BM: jax.Array, sampler: Sampler
    ) -> tuple[jax.Array, jax.Array]:
        """Accepts or rejects drafts by the rule of the paper, the function `accept`."""
        return accept(p_BNV, q_BMV, drafts_BM, sampler)


class Proposing(Drafter, Protocol):
    """A decoder whose drafts, `Drafts`, are drawn and may be rejected."""

    def accept(
        self, p_BNV: jax.Array, q_BMV: jax.Array, drafts_BM: jax.Array, sampler: Sampler
    ) -> tuple[jax.Array, jax.Array]:
        """Returns tokens and counts of accepted drafts like the function `accept`."""
        ...


def step(
    decoder: Proposing, model: DecodeModel, state: DecodeState, depth: int
) -> DecodeState:
    """Verifies the drafts, commits the accepted ones and one more, and drafts again."""
    drafts = jax.tree.map(lambda x: x[:, : depth - 1], state.carry)

    def verify(logits_BNV, sampler):
        p_BNV = target_probs(state, logits_BNV)
        return decoder.accept(p_BNV, drafts.probs_BMV, drafts.token_BM, sampler)

    return passes.step(decoder, model, state, drafts.token_BM, verify)


def accept(
    p_BNV: jax.Array, q_BMV: jax.Array, drafts_BM: jax.Array, sampler: Sampler
) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens to commit, int32 [B, N], and how many are drafts, [B].

    Args:
      p_BNV: head 1's distribution after the last committed token and each draft.
      q_BMV: the distribution that each draft was drawn from.
      drafts_BM: the drafts.
      sampler: the source of random draws.
    """
    m = drafts_BM.shape[1]
    is_draft_BMV = drafts_BM[:, :, None] == jnp.arange(p_BNV.shape[-1])[None, None]

    def of_draft(probs_BMV):
        return jnp.sum(jnp.where(is_draft_BMV, probs_BMV, 0.0), axis=-1)

    # A draft was drawn, so q is above 0; a quotient of more than 1 is a sure yes.
    ratio_BM = of_draft(p_BNV[:, :m]) / of_draft(q_BMV)
    yes_BM = jnp.minimum(ratio_BM, 1.0)
    coin_BM2 = jnp.stack([yes_BM, 1.0 - yes_BM], axis=-1)
    accepts_BM = (sampler.sample(coin_BM2) == 0).astype(jnp.int32)
    accepted_B = jnp.sum(jnp.cumprod(accepts_BM, axis=1), axis=1)

    residual_BMV = jnp.maximum(p_BNV[:, :m] - q_BMV, 0.0)
    # p and q may be equal but for rounding; then any rejection is rounding, too.
    nothing_BM1 = jnp.sum(residual_BMV, axis=-1, keepdims=True) == 0
    residual_BMV = jnp.where(nothing_BM1, p_BNV[:, :m], residual_BMV)
    residual_BNV = jnp.concatenate([residual_BMV, p_BNV[:, m:]], axis=1)
    last_B1 = sampler.sample(at_slot(residual_BNV, accepted_B)[:, None])
    order_1N = jnp.arange(m + 1)[None]
    drafts_BN = jnp.pad(drafts_BM, ((0, 0), (0, 1)))
    return jnp.where(order_1N < accepted_B[:, None], drafts_BN, last_B1), accepted_B


def choose_from(
    probs_BMV: jax.Array, state: DecodeState, sampler: Sampler
) -> jax.Array:
    """Draws a token from each distribution, int32 [B, M]; greedy: the most likely."""
    if state.sampling.greedy:
        return jnp.argmax(probs_BMV, axis=-1).astype(jnp.int32)
    return sampler.sample(probs_BMV)
