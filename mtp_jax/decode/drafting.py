"""Drafts of all heads, whatever their kind, and in which order they are made.

`make_drafts` asks heads 2 to n what they predict after the last committed token, all
at once, or one after another where a head waits for the token before its own: a chained
draft. Decoders say how a token is chosen, and do not know the kind.

Heads in a serial chain read the embedding of a token that is known only later: head
i + 1 is done with a slot when i tokens after it are committed. So their pass begins a
few slots before the new tokens, with what the trunk gave there, and its entries in the
cache take the places of those made of drafts. With one cache for all of them
(`config.heads.draft_cache` shared) only head 2 keeps entries of the text; the others
add theirs for one pass, at the positions of their drafts.

Axes: B batch, W new tokens of a pass, Y slots that a pass of serial heads reads, E
tokens of a text at most, M drafting heads, P previous tokens, D model width, X width of
the source, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.decode.cache import Cache, NewTokens, at_slot, chain, part
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.head_passes import (
    first_stream,
    run_drafting_head,
    text_at,
)
from mtp_jax.model.heads import kind_of
from mtp_jax.parallel.sharding import spec

# From logits [B, M, V] of some heads, the first of which is that number (1 is head 2):
# their tokens [B, M], and whatever is to be kept of each, a tree of [B, M, ...].
Choose = Callable[[jax.Array, int], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A place in texts where heads draft: the last position that the trunk has read."""

    source_BWX: jax.Array | None  # of the new tokens; None: draft without meaning
    new: NewTokens  # a chain
    slot_B: jax.Array  # which of them is the place
    text_BE: jax.Array  # texts with the token that is committed after it, int32


class Drafting:
    """Heads 2 to n at an anchor, asked what they predict; keeps the cache up to date.

    Those that wait for no token are asked with `all_logits`, others with `next_logits`,
    in their order.
    """

    def __init__(self, model: DecodeModel, anchor: Anchor, cache: Cache):
        self.model = model
        self.cache = cache
        self._anchor = anchor
        self._hidden: list[jax.Array] | None = None  # of heads that read no token
        self._unbiased: jax.Array | None = None  # logits of these, [B, M, V]
        self._stream: jax.Array | None = None  # of the last head of a serial chain
        self._drafts: list[jax.Array] = []  # tokens that it was told, [B, 1]
        self._tops: list[jax.Array] = []  # log probabilities of the best tokens, [B, M]

    @property
    def count(self) -> int:
        """M, the number of drafting heads."""
        return len(self.model.heads) - 1

    @property
    def waits(self) -> bool:
        """True if heads wait for the token before the one that they predict."""
        return self.model.cfg.heads.wait_for_tokens(len(self.model.heads))

    @property
    def by_parent(self) -> bool:
        """True if a head can be asked after several tokens at once, at no cost."""
        return self.waits and not self.model.cfg.heads.wiring.reads_tokens

    def all_hidden(self) -> jax.Array:
        """Normed outputs of heads that read no token, [B, M, D]."""
        if self._hidden is None:
            self._hidden = self._run_all()
        if not self._hidden:
            b, d = self._anchor.slot_B.shape[0], self.model.cfg.d_model
            like = (b, 0, d)
            return jnp.zeros(like, self.model.cfg.compute_dtype, out_sharding=_ROWS)
        return jnp.concatenate(self._hidden, axis=1)

    def all_logits(self) -> jax.Array:
        """Logits of heads that wait for no token, float32 [B, M, V]."""
        assert not self.waits, "ask them one after another"
        logits_BMV = self._logits_before_tokens()
        self._see(logits_BMV)
        return logits_BMV

    def next_logits(self, head: int, previous_BP: jax.Array) -> jax.Array:
        """Logits of a head (1 is head 2) after some previous tokens, float32 [B, P, V].

        P is 1 unless `by_parent`.
        """
        model = self.model
        if model.cfg.heads.wiring.reads_tokens and self._anchor.source_BWX is not None:
            logits_BPV = model.logits(self.hidden_after(head, previous_BP), head)
        else:
            logits_BPV = self._logits_before_tokens()[:, head - 1 : head]
        if model.w_markov_in_Vr is not None:
            # Of ids to spare the sum stays -inf.
            logits_BPV = logits_BPV + model.bias(previous_BP)
        self._see(logits_BPV[:, :1])
        return logits_BPV

    def confidence(self, done_B: jax.Array) -> jax.Array:
        """The probability of each head's most likely token, a mean, float32 [M]."""
        if not self._tops:
            return jnp.zeros(0)
        top_BM = jnp.concatenate(
            [jax.sharding.reshard(x, _TOKENS) for x in self._tops], 1
        )
        counts_B1 = jnp.where(done_B, 0.0, 1.0)[:, None]
        return jnp.sum(jnp.exp(top_BM) * counts_B1, axis=0) / jnp.sum(counts_B1)

    def _see(self, logits_BMV: jax.Array) -> None:
        """Keeps how sure the heads are; never computed if nobody asks."""
        log_p_BMV = jax.nn.log_softmax(logits_BMV, axis=-1)
        self._tops.append(jnp.max(log_p_BMV, axis=-1))

    def _logits_before_tokens(self) -> jax.Array:
        """Logits of all heads, float32 [B, M, V], without what tokens add to them.

        Together, since the unembedding is most of what a small model reads in a pass.
        """
        if self._unbiased is None:
            heads = range(1, self.count + 1)
            self._unbiased = self.model.logits(self.all_hidden(), heads)
        return self._unbiased

    def _run_all(self) -> list[jax.Array]:
        model, cfg = self.model, self.model.cfg
        anchor, kind = self._anchor, kind_of(cfg)
        drafting = range(1, len(model.heads))
        if anchor.source_BWX is None:
            b = anchor.slot_B.shape[0]
            like = (b, 1, cfg.d_model)
            zeros_B1D = jnp.zeros(like, cfg.compute_dtype, out_sharding=_ROWS)
            return [zeros_B1D for _ in drafting]
        reads = cfg.heads.wiring.reads
        if reads == "after":
            at_B1X = at_slot(anchor.source_BWX, anchor.slot_B)[:, None]
            streams = [at_B1X[..., (i - 1) * cfg.d_model : i * cfg.d_model] for i in
                       drafting]  # fmt: skip
        else:
            streams, x_BWX = [], anchor.source_BWX
            for i in drafting:
                ends = reads == "trunk" or i == drafting[-1]
                slot_B = anchor.slot_B if ends else None
                x, self.cache = run_drafting_head(
                    model, i, x_BWX, None, anchor.new, self.cache, slot_B
                )
                streams.append(x if ends else at_slot(x, anchor.slot_B)[:, None])
                x_BWX = x_BWX if reads == "trunk" else x
        return [
            kind.finish(cfg, model.norm(i), x)
            for i, x in zip(drafting, streams, strict=True)
        ]

    def hidden_after(self, head: int, previous_B1: jax.Array) -> jax.Array:
        """Normed output of the next head of a serial chain after a token, [B, 1, D]."""
        model, cfg, anchor = self.model, self.model.cfg, self._anchor
        if head > 1:  # what head 2 reads is committed
            self._drafts.append(previous_B1)
        place_B = anchor.new.start_B + anchor.slot_B
        if cfg.heads.draft_cache == "shared" and head > 1:
            assert self._stream is not None
            self._stream, self.cache = run_drafting_head(
                model, head, self._stream, model.embed(previous_B1),
                chain(previous_B1, place_B + head - 1), self.cache,
            )  # fmt: skip
            return kind_of(cfg).finish(cfg, model.norm(head), self._stream)
        start_B, trunk_BYD = self._slots()
        if head == 1:
            self._stream = first_stream(model, trunk_BYD)
        assert self._stream is not None
        token_BY = self._tokens(start_B + head, trunk_BYD.shape[1], place_B + 2)
        at_B = place_B - start_B
        # The next of the chain reads all slots, and with one cache the last alone.
        is_last = head == self.count or cfg.heads.draft_cache == "shared"
        self._stream, self.cache = run_drafting_head(
            model, head, self._stream, model.embed(token_BY),
            chain(token_BY, start_B), self.cache, at_B if is_last else None,
        )  # fmt: skip
        stream_B1D = self._stream if is_last else at_slot(self._stream, at_B)[:, None]
        return kind_of(cfg).finish(cfg, model.norm(head), stream_B1D)

    def _slots(self) -> tuple[jax.Array, jax.Array]:
        """The first slot of a pass, [B], and the trunk's outputs there, [B, Y, D]."""
        anchor = self._anchor
        back = self.model.cfg.heads.lookback(len(self.model.heads))
        assert anchor.source_BWX is not None
        if not back:
            return anchor.new.start_B, anchor.source_BWX
        start_B = jnp.maximum(anchor.new.start_B - back, 0)
        assert self.cache.trunk_BSD is not None
        width = anchor.new.tokens_BW.shape[1] + back
        return start_B, part(self.cache.trunk_BSD, start_B, width)

    def _tokens(self, at_B: jax.Array, width: int, length_B: jax.Array) -> jax.Array:
        """Tokens of the texts with the drafts after them, int32 [B, Y]."""
        token_BY = text_at(self._anchor.text_BE, at_B, width)
        after_BY = at_B[:, None] + jnp.arange(width)[None] - length_B[:, None]
        for i, draft_B1 in enumerate(self._drafts):
            token_BY = jnp.where(after_BY == i, draft_B1, token_BY)
        return token_BY


def make_drafts(
    drafting: Drafting, last_B1: jax.Array, choose: Choose
) -> tuple[jax.Array, Any]:
    """Drafts of all heads, int32 [B, M], and what `choose` keeps of them, [B, M, ...].

    Args:
      drafting: the heads at their anchor.
      last_B1: the last committed token, after which they draft.
      choose: makes tokens of logits.
    """
    if not drafting.waits:
        tokens_BM, kept = choose(drafting.all_logits(), 1)
        return jax.sharding.reshard(tokens_BM, _TOKENS), kept
    found = []
    for head in range(1, drafting.count + 1):
        token_B1, kept = choose(drafting.next_logits(head, last_B1), head)
        last_B1 = jax.sharding.reshard(token_B1, _TOKENS)
        found.append((last_B1, kept))
    # Indexing a batch of one row may forget that it is split like any other.
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *found)


_ROWS = spec("batch", None, None)
_TOKENS = spec("batch", None)
