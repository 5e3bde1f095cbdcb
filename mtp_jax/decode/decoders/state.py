"""The state of decoding, the interface of decoders, and how tokens are committed.

Axes: B batch, E tokens of a text at most, W tokens of a forward pass, N heads, D model
width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.cache import Cache, NewTokens, at_slot, chain
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders.sampling import (
    RandomKeys,
    Sampler,
    SamplingArrays,
    most_likely,
    penalize,
    probabilities,
)
from mtp_jax.decode.drafting import Anchor, Drafting
from mtp_jax.parallel.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alone:
    """Sources kept for drafting heads that are left alone (`adaptive`)."""

    source_BEX: jax.Array  # of `read_first`, where the heads have not read them
    since_B: jax.Array  # the first position that they have not read
    entropy: jax.Array  # min-entropy of head 1, nats, a running mean; -1: not known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """A batch of texts in the making; they may differ in length.

    The cache holds every position before the last committed token, which is the first
    token that the next forward pass reads.
    """

    tokens_BE: jax.Array  # prompt, then the committed tokens, int32
    forward_BE: jax.Array  # which forward pass committed each of them; 0: the prompt
    accepted_BE: jax.Array  # how many drafts that forward pass accepted
    # 1 where a lossy decoder deviated from the exact choice, int32; None: exact ones
    deviated_BE: jax.Array | None
    length_B: jax.Array  # prompt and committed tokens
    limit_B: jax.Array  # the length that ends a text
    done_B: jax.Array  # a text that no longer changes
    forward: jax.Array  # forward passes so far; the prompt is the first
    passes_BN: (
        jax.Array
    )  # number of forward passes with 0, 1 ... accepted drafts, int32
    seen_BV: jax.Array | None  # tokens of the text, where repetition is penalized
    cache: Cache
    carry: Any  # whatever else the decoder wants to keep
    sampling: SamplingArrays
    keys: RandomKeys
    alone: Alone | None  # None: the drafting heads have read what head 1 has
    end_ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def ends_text(tokens: jax.Array, end_ids: Sequence[int]) -> jax.Array:
    """True for the tokens that end a text, bool in the shape of the tokens."""
    return functools.reduce(jnp.logical_or, [tokens == i for i in end_ids])


class PromptEnd:
    """Heads at the end of the prompts, in a program that begins texts."""

    def __init__(
        self, hidden_B1D: jax.Array, source_B1X: jax.Array | None, length_B: jax.Array
    ):
        """Takes head 1's output, the source of the others or None, and the lengths."""
        self.hidden_B1D = hidden_B1D
        self._source_B1X = source_B1X
        self._last_B = length_B - 1
        self._asked: Drafting | None = None

    def drafting(self, model: DecodeModel, state: DecodeState) -> Drafting:
        """The drafting heads after the first token, which the state has."""
        token_B1 = at_slot(state.tokens_BE, self._last_B)[:, None]
        new = chain(token_B1, self._last_B)
        slot_B = jnp.zeros_like(self._last_B)
        anchor = Anchor(self._source_B1X, new, slot_B, state.tokens_BE)
        self._asked = Drafting(model, anchor, state.cache)
        return self._asked

    def confidence(self, done_B: jax.Array) -> jax.Array:
        """That of the drafting heads, if they were asked, float32 [M]."""
        return jnp.zeros(0) if self._asked is None else self._asked.confidence(done_B)


def option(default: Any, text: str) -> Any:
    """A dataclass field that is an option of a decoder, with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


class Decoder(Protocol):
    """A way of decoding: a frozen dataclass, whose fields are its options."""

    lossy: ClassVar[bool]  # True if texts may differ from plain's in distribution

    def heads(self, n: int) -> int:
        """The number of heads that it runs, of a model's n."""
        ...

    def width(self, n: int) -> int:
        """The most tokens that a forward pass of a model with n heads reads."""
        ...

    def begin(
        self, model: DecodeModel, state: DecodeState, end: "PromptEnd"
    ) -> DecodeState:
        """Commits the first token, from what is known at the prompt's end."""
        ...

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Runs a forward pass; commits at least one token of each unfinished text.

        `depth` heads are used: up to depth - 1 drafts in a row are verified.
        """
        ...


class Drafter(Decoder, Protocol):
    """A decoder that can leave its heads alone for a while."""

    def draft(
        self,
        model: DecodeModel,
        state: DecodeState,
        drafting: Drafting,
        sampler: Sampler,
    ) -> Any:
        """Returns the carry of the next pass, made of what the heads predict."""
        ...


@runtime_checkable
class ReadsTables(Protocol):
    """A decoder that reads more than the model: a file of its own."""

    def tables(self, fingerprint: str, vocab_size: int) -> Any:
        """Returns a tree of arrays, `DecodeModel.tables` of every program.

        Args:
          fingerprint: of the model's tokenizer.
          vocab_size: of the model.

        Raises:
          UserError: no file, or one that does not fit.
        """
        ...


@runtime_checkable
class Finishing(Protocol):
    """A decoder whose texts are not reported as they stand in its state."""

    def finish(self, model: DecodeModel, state: DecodeState) -> DecodeState:
        """Returns the state to report; decoding goes on from the given one."""
        ...


def commit(
    state: DecodeState,
    tokens_BW: jax.Array,
    count_B: jax.Array,
    accepted_B: jax.Array,
    deviated_BW: jax.Array | None = None,
) -> DecodeState:
    """Appends tokens to the unfinished texts, up to end of text or the limit.

    Args:
      state: before; its cache already holds what the forward pass read.
      tokens_BW: candidates.
      count_B: how many of them, from the first on.
      accepted_B: how many drafts the forward pass accepted.
      deviated_BW: which candidates are not the exact choice, bool; None: all are.
    """
    room_B = jnp.where(state.done_B, 0, state.limit_B - state.length_B)
    ends_BW = ends_text(tokens_BW, state.end_ids)
    ended_before_BW = jnp.cumsum(ends_BW, axis=1) > ends_BW
    order_1W = jnp.arange(tokens_BW.shape[1])[None]
    kept_BW = (order_1W < jnp.minimum(count_B, room_B)[:, None]) & ~ended_before_BW
    new_B = jnp.sum(kept_BW, axis=1, dtype=jnp.int32)
    length_B = state.length_B + new_B

    order_1E = jnp.arange(state.tokens_BE.shape[1])[None]
    offset_BE = order_1E - state.length_B[:, None]
    new_BE = (offset_BE >= 0) & (offset_BE < new_B[:, None])
    is_token_BEW = offset_BE[:, :, None] == order_1W[:, None]

    def placed(x_BW, old_BE):
        x_BE = jnp.sum(jnp.where(is_token_BEW, x_BW[:, None], 0), axis=2)
        return jnp.where(new_BE, x_BE, old_BE)

    forward = state.forward + 1
    counts_N = jnp.arange(state.passes_BN.shape[1])[None]
    passed_BN = (accepted_B[:, None] == counts_N) & ~state.done_B[:, None]
    seen_BV = state.seen_BV
    if seen_BV is not None:
        kept = jnp.where(kept_BW, tokens_BW, -1)
        seen_BV = seen_BV | jnp.any(_one_hot(kept, seen_BV.shape[1]), axis=1)
    return dataclasses.replace(
        state,
        tokens_BE=placed(tokens_BW, state.tokens_BE),
        forward_BE=jnp.where(new_BE, forward, state.forward_BE),
        accepted_BE=jnp.where(new_BE, accepted_B[:, None], state.accepted_BE),
        deviated_BE=state.deviated_BE
        if deviated_BW is None
        else placed(deviated_BW, state.deviated_BE),
        length_B=length_B,
        done_B=state.done_B
        | (length_B >= state.limit_B)
        | jnp.any(kept_BW & ends_BW, axis=1),
        forward=forward,
        passes_BN=state.passes_BN + passed_BN,
        seen_BV=seen_BV,
    )


def last_token(state: DecodeState) -> jax.Array:
    """The last committed token of each text, int32 [B, 1]."""
    return at_slot(state.tokens_BE, state.length_B - 1)[:, None]


def next_logits(
    model: DecodeModel,
    state: DecodeState,
    head_BWD: jax.Array,
    new: NewTokens | None = None,
) -> jax.Array:
    """Penalized logits, float32 [B, W, V], of outputs of head 1.

    Args:
      model: the model.
      state: before the forward pass.
      head_BWD: the outputs, normed.
      new: what the forward pass read; None: nothing that is not committed yet.
    """
    logits_BWV = model.logits(head_BWD)
    if state.seen_BV is None:
        return logits_BWV
    seen_BWV = state.seen_BV[:, None]
    if new is not None:
        w = new.tokens_BW.shape[1]
        own_WW = new.ancestors_WW
        own_WW = np.tril(np.ones((w, w), bool)) if own_WW is None else own_WW
        is_BUV = _one_hot(new.tokens_BW, seen_BWV.shape[-1])
        own_BWV = jnp.any(own_WW[None, :, :, None] & is_BUV[:, None], axis=2)
        seen_BWV = seen_BWV | own_BWV
    seen_BWV = jax.sharding.reshard(seen_BWV, spec("batch", None, "vocab"))
    return penalize(state.sampling, logits_BWV, seen_BWV)


def choose(state: DecodeState, logits_BWV: jax.Array, sampler: Sampler) -> jax.Array:
    """Chooses a next token for each position, as the state samples, int32 [B, W]."""
    if state.sampling.greedy:
        return most_likely(logits_BWV)
    return sampler.sample(target_probs(state, logits_BWV))


def target_probs(state: DecodeState, logits_BWV: jax.Array) -> jax.Array:
    """Target distributions of the next token, float32 [B, W, V], whole per device."""
    whole = spec("batch", None, None)
    return probabilities(state.sampling, jax.sharding.reshard(logits_BWV, whole))


def head_probs(state: DecodeState, logits_BWV: jax.Array) -> jax.Array:
    """Distributions that heads predict, float32 [B, W, V], whole on every device.

    As the state samples, but without its penalty; for a greedy one, at temperature 1.
    """
    if not state.sampling.greedy:
        return target_probs(state, logits_BWV)
    whole = spec("batch", None, None)
    return jax.nn.softmax(jax.sharding.reshard(logits_BWV, whole), axis=-1)


def _one_hot(tokens_BW: jax.Array, vocab: int) -> jax.Array:
    """One-hot tokens, bool [B, W, V]; all false for a token of -1."""
    return tokens_BW[:, :, None] == jnp.arange(vocab)[None, None]
