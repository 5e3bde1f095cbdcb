"""Speculative sampling with the model's own heads (arXiv:2211.17192, algorithm 1).

Head i draws a draft from its own law q; head 1, with law p, accepts it with probability
min(1, p / q), and at the first rejection draws from the rest, max(0, p - q), instead.
Texts have exactly the law of `plain`'s, whatever the heads say. All that the proof
there asks for is that each draft was drawn from its q, given the text before it.

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
from mtp_jax.decode.decoders.state import DecodeState, Drafter, target_probs
from mtp_jax.parallel.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
    """Tokens that heads 2..n propose."""

    token_BM: jax.Array  # int32
    target_BMV: jax.Array  # what each was drawn from, given those before it, float32


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Drafts are drawn from the heads' laws; exact at any temperature."""

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
        """Commits a draw of head 1 at the prompt's end, and drafts with the others."""
        return passes.begin(self, model, state, heads_BND)

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Verifies drafts, commits the right ones and one more, and drafts again."""
        return step(self, model, state, depth)

    def draft(
        self,
        model: DecodeModel,
        state: DecodeState,
        heads_BMD: jax.Array,
        sampler: Sampler,
    ) -> Drafts:
        """A draw of each drafting head, and what it was drawn from."""
        # Tokens that the text repeats are not penalized: any law of drafts will do.
        target_BMV = target_probs(state, model.logits(heads_BMD))
        token_BM = choose_from(target_BMV, state, sampler)
        return Drafts(jax.sharding.reshard(token_BM, spec("batch", None)), target_BMV)

    def accept(
        self, p_BNV: jax.Array, q_BMV: jax.Array, drafts_BM: jax.Array, sampler: Sampler
    ) -> tuple[jax.Array, jax.Array]:
        """`accept`, the rule of the paper."""
        return accept(p_BNV, q_BMV, drafts_BM, sampler)


class Proposing(Drafter, Protocol):
    """A decoder whose drafts are drawn from laws, `Drafts`, and may be refused."""

    def accept(
        self, p_BNV: jax.Array, q_BMV: jax.Array, drafts_BM: jax.Array, sampler: Sampler
    ) -> tuple[jax.Array, jax.Array]:
        """As the function `accept`."""
        ...


def step(
    decoder: Proposing, model: DecodeModel, state: DecodeState, depth: int
) -> DecodeState:
    """Verifies what was drafted, commits what is right, and has it draft again."""
    drafts = jax.tree.map(lambda x: x[:, : depth - 1], state.carry)

    def verify(logits_BNV, sampler):
        p_BNV = target_probs(state, logits_BNV)
        return decoder.accept(p_BNV, drafts.target_BMV, drafts.token_BM, sampler)

    return passes.step(decoder, model, state, drafts.token_BM, verify)


def accept(
    p_BNV: jax.Array, q_BMV: jax.Array, drafts_BM: jax.Array, sampler: Sampler
) -> tuple[jax.Array, jax.Array]:
    """The tokens to commit, int32 [B, N], and how many drafts are among them, [B].

    Args:
      p_BNV: head 1's law after the last committed token and after each draft.
      q_BMV: the law that each draft was drawn from.
      drafts_BM: the drafts.
      draws: chance.
    """
    m = drafts_BM.shape[1]
    is_draft_BMV = drafts_BM[:, :, None] == jnp.arange(p_BNV.shape[-1])[None, None]

    def of_draft(target_BMV):
        return jnp.sum(jnp.where(is_draft_BMV, target_BMV, 0.0), axis=-1)

    # A draft was drawn, so q is above 0; a quotient of more than 1 is a sure yes.
    ratio_BM = of_draft(p_BNV[:, :m]) / of_draft(q_BMV)
    yes_BM = jnp.minimum(ratio_BM, 1.0)
    coin_BM2 = jnp.stack([yes_BM, 1.0 - yes_BM], axis=-1)
    right_BM = (sampler.pick(coin_BM2) == 0).astype(jnp.int32)
    accepted_B = jnp.sum(jnp.cumprod(right_BM, axis=1), axis=1)

    rest_BMV = jnp.maximum(p_BNV[:, :m] - q_BMV, 0.0)
    # p and q may be equal but for rounding; then any rejection is rounding, too.
    nothing_BM1 = jnp.sum(rest_BMV, axis=-1, keepdims=True) == 0
    rest_BMV = jnp.where(nothing_BM1, p_BNV[:, :m], rest_BMV)
    rest_BNV = jnp.concatenate([rest_BMV, p_BNV[:, m:]], axis=1)
    last_B1 = sampler.pick(at_slot(rest_BNV, accepted_B)[:, None])
    order_1N = jnp.arange(m + 1)[None]
    drafts_BN = jnp.pad(drafts_BM, ((0, 0), (0, 1)))
    return jnp.where(order_1N < accepted_B[:, None], drafts_BN, last_B1), accepted_B


def choose_from(
    target_BMV: jax.Array, state: DecodeState, sampler: Sampler
) -> jax.Array:
    """A draw from each law; of a greedy one there is nothing to draw."""
    if state.sampling.greedy:
        return jnp.argmax(target_BMV, axis=-1).astype(jnp.int32)
    return sampler.pick(target_BMV)
