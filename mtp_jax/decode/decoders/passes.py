"""The forward passes that decoders share: one token, a chain of drafts, any new ones.

Axes: N heads, M = N - 1 drafts, B batch, W tokens that are read, D model width, V
vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtp_jax.decode.cache import (
    Cache,
    NewTokens,
    chain,
    decode_head,
    decode_heads_at,
    decode_trunk,
)
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders.sampling import Sampler
from mtp_jax.decode.decoders.state import (
    DecodeState,
    Drafter,
    choose,
    commit,
    last_token,
    next_logits,
)

# From head 1's penalized logits after each token that was read, [B, N, V]: the tokens
# to commit, [B, N], and how many drafts are among them, [B].
Verify = Callable[[jax.Array, Sampler], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class PassOutput:
    """The output of the trunk and of head 1 for new tokens."""

    new: NewTokens
    trunk_BWD: jax.Array
    logits_BWV: jax.Array  # of head 1, penalized
    cache: Cache


def read(model: DecodeModel, state: DecodeState, tokens_BW: jax.Array) -> PassOutput:
    """Runs a pass over the last committed token, first in tokens_BW, and drafts."""
    return read_new(model, state, chain(tokens_BW, state.length_B - 1))


def read_new(model: DecodeModel, state: DecodeState, new: NewTokens) -> PassOutput:
    """Runs the trunk and head 1 over new tokens, a chain or a tree."""
    trunk_BWD, cache = decode_trunk(model, new, state.cache)
    head_BWD, cache = decode_head(model, 0, trunk_BWD, new, cache)
    return PassOutput(new, trunk_BWD, next_logits(model, state, head_BWD, new), cache)


def write_one(state: DecodeState, logits_B1V: jax.Array) -> DecodeState:
    """Commits one token, chosen by head 1's distribution."""
    sampler = Sampler(state.keys, state.length_B)
    token_B1 = choose(state, logits_B1V, sampler)
    state = dataclasses.replace(state, keys=sampler.next_keys())
    return _commit_one(state, token_B1)


def begin(
    decoder: Drafter, model: DecodeModel, state: DecodeState, heads_BND: jax.Array
) -> DecodeState:
    """Commits head 1's token at the prompt's end, and has the other heads draft on."""
    sampler = Sampler(state.keys, state.length_B)
    next_B1 = choose(state, next_logits(model, state, heads_BND[:, :1]), sampler)
    state = _commit_one(state, next_B1)
    drafts = decoder.draft(model, state, heads_BND[:, 1:], sampler)
    return dataclasses.replace(state, carry=drafts, keys=sampler.next_keys())


def step(
    decoder: Drafter,
    model: DecodeModel,
    state: DecodeState,
    drafts_BM: jax.Array,
    verify: Verify,
) -> DecodeState:
    """Verifies drafts, commits the accepted ones and one more, and drafts again."""
    tokens_BN = jnp.concatenate([last_token(state), drafts_BM], axis=1)
    out = read(model, state, tokens_BN)
    sampler = Sampler(state.keys, state.length_B)
    chosen_BN, accepted_B = verify(out.logits_BWV, sampler)

    drafting = range(1, len(model.heads))
    heads_BMD, cache = decode_heads_at(
        model, drafting, out.trunk_BWD, out.new, accepted_B, out.cache
    )
    state = commit(state, chosen_BN, accepted_B + 1, accepted_B)
    drafts = decoder.draft(model, state, heads_BMD, sampler)
    return dataclasses.replace(
        state, cache=cache, carry=drafts, keys=sampler.next_keys()
    )


def _commit_one(state: DecodeState, token_B1: jax.Array) -> DecodeState:
    """Commits a token of each text in a pass that verified no draft."""
    none_B = jnp.zeros_like(state.length_B)
    return commit(state, token_B1, none_B + 1, none_B)
