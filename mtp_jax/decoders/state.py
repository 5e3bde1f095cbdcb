"""What decoding carries from one forward pass to the next, and how tokens enter it.

Axes: B batch, S slots, W tokens of a forward pass, N heads, D model width.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mtp_jax.cache import Cache, at_slot
from mtp_jax.model import LanguageModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of texts in the making; they may differ in length.

    The cache holds every position before the last committed token, which is the first
    token that the next forward pass reads.
    """

    tokens_BS: jax.Array  # prompt, then the committed tokens, int32
    forward_BS: jax.Array  # which forward pass committed each of them; 0: the prompt
    agreed_BS: jax.Array  # how many drafts that forward pass found to be right
    length_B: jax.Array  # prompt and committed tokens
    limit_B: jax.Array  # the length that ends a text
    done_B: jax.Array  # a text that no longer changes
    forward: jax.Array  # forward passes so far; the prompt is the first
    cache: Cache
    carry: Any  # whatever else the decoder wants to keep
    eos_id: int = dataclasses.field(metadata={"static": True})


class Decoder(Protocol):
    """A way of decoding."""

    def heads(self, n: int) -> int:
        """How many of a model's n heads it runs."""
        ...

    def begin(
        self, model: LanguageModel, state: DecodeState, heads_NBD: jax.Array
    ) -> DecodeState:
        """Commits the first token, from what the heads say at the prompt's end."""
        ...

    def step(self, model: LanguageModel, state: DecodeState) -> DecodeState:
        """One forward pass; commits at least one token of each unfinished text."""
        ...


def commit(
    state: DecodeState, tokens_BW: jax.Array, count_B: jax.Array, agreed_B: jax.Array
) -> DecodeState:
    """Appends tokens to the unfinished texts, up to end of text or the limit.

    Args:
      state: before; its cache already holds what the forward pass read.
      tokens_BW: candidates.
      count_B: how many of them, from the first on.
      agreed_B: how many drafts the forward pass found to be right.
    """
    room_B = jnp.where(state.done_B, 0, state.limit_B - state.length_B)
    ends_BW = tokens_BW == state.eos_id
    ended_before_BW = jnp.cumsum(ends_BW, axis=1) > ends_BW
    order_1W = jnp.arange(tokens_BW.shape[1])[None]
    kept_BW = (order_1W < jnp.minimum(count_B, room_B)[:, None]) & ~ended_before_BW
    new_B = jnp.sum(kept_BW, axis=1, dtype=jnp.int32)
    length_B = state.length_B + new_B

    order_1S = jnp.arange(state.tokens_BS.shape[1])[None]
    offset_BS = order_1S - state.length_B[:, None]
    new_BS = (offset_BS >= 0) & (offset_BS < new_B[:, None])
    is_token_BSW = offset_BS[:, :, None] == order_1W[:, None]
    token_BS = jnp.sum(jnp.where(is_token_BSW, tokens_BW[:, None], 0), axis=2)
    forward = state.forward + 1
    return dataclasses.replace(
        state,
        tokens_BS=jnp.where(new_BS, token_BS, state.tokens_BS),
        forward_BS=jnp.where(new_BS, forward, state.forward_BS),
        agreed_BS=jnp.where(new_BS, agreed_B[:, None], state.agreed_BS),
        length_B=length_B,
        done_B=state.done_B
        | (length_B >= state.limit_B)
        | jnp.any(kept_BW & ends_BW, axis=1),
        forward=forward,
    )


def say(model: LanguageModel, heads_BWD: jax.Array) -> jax.Array:
    """The most likely token of each output of a head, int32 [B, W]."""
    return most_likely(model.logits(heads_BWD, model.unembedding()))


def last_token(state: DecodeState) -> jax.Array:
    """The last committed token of each text, int32 [B, 1]."""
    return at_slot(state.tokens_BS, state.length_B - 1)[:, None]


def most_likely(logits_BTV: jax.Array) -> jax.Array:
    """The first token of the highest score, int32 [B, T].

    Two plain reductions instead of argmax: they stay on their shards when V is split,
    and compilers make vector code of them.
    """
    vocab = logits_BTV.shape[-1]
    top_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    ids_11V = jnp.arange(vocab, dtype=jnp.int32)[None, None]
    return jnp.min(jnp.where(logits_BTV == top_BT1, ids_11V, vocab - 1), axis=-1)
