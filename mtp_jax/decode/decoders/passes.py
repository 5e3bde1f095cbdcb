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
    decode_trunk,
)
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders.sampling import Sampler
from mtp_jax.decode.decoders.state import (
    DecodeState,
    Drafter,
    PromptEnd,
    choose,
    commit,
    last_token,
    next_logits,
)
from mtp_jax.decode.drafting import Anchor, Drafting
from mtp_jax.decode.head_passes import read_first

# From head 1's penalized logits after each token that was read, [B, N, V]: the tokens
# to commit, [B, N], and how many drafts are among them, [B].
Verify = Callable[[jax.Array, Sampler], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class PassOutput:
    """The output of head 1 for new tokens, and what the other heads read."""

    new: NewTokens
    source_BWX: jax.Array
    logits_BWV: jax.Array  # of head 1, penalized
    cache: Cache


def read(model: DecodeModel, state: DecodeState, tokens_BW: jax.Array) -> PassOutput:
    """Runs a pass over the last committed token, first in tokens_BW, and drafts."""
    return read_new(model, state, chain(tokens_BW, state.length_B - 1))


def read_new(model: DecodeModel, state: DecodeState, new: NewTokens) -> PassOutput:
    """Runs the trunk and head 1 over new tokens, a chain or a tree."""
    trunk_BWD, cache = decode_trunk(model, new, state.cache)
    head_BWD, source_BWX, cache = read_first(model, trunk_BWD, new, cache)
    return PassOutput(new, source_BWX, next_logits(model, state, head_BWD, new), cache)


def write_one(state: DecodeState, logits_B1V: jax.Array) -> DecodeState:
    """Commits one token, chosen by head 1's distribution."""
    sampler = Sampler(state.keys, state.length_B)
    token_B1 = choose(state, logits_B1V, sampler)
    state = dataclasses.replace(state, keys=sampler.next_keys())
    return _commit_one(state, token_B1)


def begin(
    decoder: Drafter, model: DecodeModel, state: DecodeState, end: PromptEnd
) -> DecodeState:
    """Commits head 1's token at the prompt's end, and has the other heads draft on."""
    sampler = Sampler(state.keys, state.length_B)
    next_B1 = choose(state, next_logits(model, state, end.hidden_B1D), sampler)
    state = _commit_one(state, next_B1)
    drafting = end.drafting(model, state)
    return drafted(decoder, model, state, drafting, sampler)


def drafted(
    decoder: Drafter,
    model: DecodeModel,
    state: DecodeState,
    drafting: Drafting,
    sampler: Sampler,
) -> DecodeState:
    """The state with the drafts of its next pass, and the cache after drafting."""
    carry = decoder.draft(model, state, drafting, sampler)
    return dataclasses.replace(
        state, cache=drafting.cache, carry=carry, keys=sampler.next_keys()
    )


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
    state = commit(state, chosen_BN, accepted_B + 1, accepted_B)
    anchor = Anchor(out.source_BWX, out.new, accepted_B, state.tokens_BE)
    drafting = Drafting(model, anchor, out.cache)
    return drafted(decoder, model, state, drafting, sampler)


def _commit_one(state: DecodeState, token_B1: jax.Array) -> DecodeState:
    """Commits a token of each text in a pass that verified no draft."""
    none_B = jnp.zeros_like(state.length_B)
    return commit(state, token_B1, none_B + 1, none_B)
