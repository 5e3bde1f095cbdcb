"""Adaptive depth: the number of heads to use in each stretch of forward passes.

Drafting pays where more tokens are accepted than the wider pass costs. Both are
measured: the seconds of a pass at every depth, for the batch at hand, and how many
drafts of the last passes were accepted. At depth 1 the drafting heads are left alone
altogether; what they read is kept, so that they can catch up later.

Axes: B batch, E tokens of a text at most, W tokens that are caught up at once, X width
of what drafting heads read, V vocabulary.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtp_jax.config import ModelConfig
from mtp_jax.decode.cache import at_slot, chain, part, store
from mtp_jax.decode.decode_model import DecodeModel, build
from mtp_jax.decode.decoders.passes import drafted, read, write_one
from mtp_jax.decode.decoders.sampling import Sampler
from mtp_jax.decode.decoders.state import (
    Alone,
    DecodeState,
    Drafter,
    PromptEnd,
    last_token,
)
from mtp_jax.decode.drafting import Anchor, Drafting
from mtp_jax.decode.head_passes import extend
from mtp_jax.parallel.sharding import spec

CATCH_UP = 16  # tokens that the drafting heads read at once when they are asked again

_GAIN = 1.03  # drafting must promise so much more than not drafting
_PATIENCE = 512  # passes at depth 1 before the heads are asked again, the first time
_MOST_PATIENCE = 4096  # the same, at last
_LEAST_ALONE_S = 1.0  # nor before so long: what asking takes is to be small beside it
_TRIAL = 16  # passes for which they are then asked
_KNOWN = 8.0  # passes after which the acceptance of drafts counts as known
_GUESS = 4.0  # passes that the heads' own confidence counts for
_BEFORE = 32.0  # passes that all earlier texts count for, at most
_STRETCH_S = 0.03  # between two decisions on the depth: looking costs about 1 ms
_LONGEST_S = 0.25  # the same, while they come out alike
_FEWEST = 4  # forward passes between them
_MEMORY = 32.0  # passes of all texts, after which what was seen counts half
_CALMER = 0.6  # share of the entropy at which heads are asked again before their time


def leave_heads(state: DecodeState, width: int) -> DecodeState:
    """Has only head 1 read from now on; `state.alone` has the start.

    `width` is that of what the heads read, `head_passes.source_width`.
    """
    b, e = state.tokens_BE.shape
    dtype = state.cache.k_BGSK[0].dtype
    source_BEX = jnp.zeros((b, e, width), dtype, out_sharding=_BATCH_SPEC)
    alone = Alone(source_BEX, state.length_B - 1, _unknown())
    return dataclasses.replace(state, alone=alone)


def begin_alone(
    model: DecodeModel,
    state: DecodeState,
    head_B1D: jax.Array,
    source_BEX: jax.Array,
    decoder: Drafter,
) -> DecodeState:
    """Commits the first token where only head 1 has read the prompts.

    Args:
      model: the model.
      state: before.
      head_B1D: head 1's output at the end of each prompt.
      source_BEX: what the other heads are to read.
      decoder: the one that goes on; its carry gets drafts without meaning.
    """
    alone = Alone(source_BEX, jnp.zeros_like(state.length_B), _unknown())
    end = PromptEnd(head_B1D, None, state.length_B)
    return dataclasses.replace(decoder.begin(model, state, end), alone=alone)


def step_alone(model: DecodeModel, state: DecodeState) -> DecodeState:
    """Commits one token by head 1, as every exact decoder does at depth 1."""
    alone = state.alone
    assert alone is not None, "leave_heads comes first"
    out = read(model, state, last_token(state))
    entropy = jnp.mean(_entropy(out.logits_BWV))
    mean = jnp.where(alone.entropy < 0, entropy, 0.9 * alone.entropy + 0.1 * entropy)
    alone = Alone(
        source_BEX=store(alone.source_BEX, out.source_BWX, out.new.start_B),
        since_B=alone.since_B,
        entropy=mean,
    )
    state = dataclasses.replace(state, cache=out.cache, alone=alone)
    return write_one(state, out.logits_BWV)


def catch_up(
    cfg: ModelConfig,
    params: Any,
    state: DecodeState,
    alone: Alone,
    decoder: Drafter,
    ids: int | None = None,
) -> DecodeState:
    """Has the drafting heads read what they have missed, and draft again.

    Args:
      cfg: of the model.
      params: from `decode_model.unstack`.
      state: the state, without `alone`.
      alone: what the heads have not read.
      decoder: the decoder that drafts.
      ids: as for `build`.
    """
    last_B = state.length_B - 2  # the last position that was read
    text_BE = state.tokens_BE
    # Heads of a chain have read drafts where they were left, not what came to stand
    # there.
    model = build(cfg, params, ids)
    back = cfg.heads.lookback(len(model.heads))
    since_B = jnp.maximum(alone.since_B - back, 0)

    def behind(carry):
        return jnp.any(carry[0] <= last_B)

    def chunk(carry):
        from_B, cache = carry
        in_loop = build(cfg, params)
        source_BEX = cache.trunk_BSD if back else alone.source_BEX
        source_BWX = part(source_BEX, from_B, CATCH_UP)
        nothing_BW = jnp.zeros(
            source_BWX.shape[:2], jnp.int32, out_sharding=_TOKEN_SPEC
        )
        cache = extend(in_loop, source_BWX, chain(nothing_BW, from_B), text_BE, cache)
        return jnp.minimum(from_B + CATCH_UP, last_B + 1), cache

    _, cache = lax.while_loop(behind, chunk, (since_B, state.cache))
    sampler = Sampler(state.keys, state.length_B)
    last_token_B1 = at_slot(text_BE, last_B)[:, None]
    anchor = Anchor(
        part(alone.source_BEX, last_B, 1),
        chain(last_token_B1, last_B),
        jnp.zeros_like(last_B),
        text_BE,
    )
    drafting = Drafting(model, anchor, cache)
    return drafted(decoder, model, state, drafting, sampler)


class DepthSchedule:
    """Depths in turn, one forward pass each, and again; the first reads the prompts.

    It measures nothing, so that what is written depends on no clock.
    """

    def __init__(self, depths: Sequence[int]):
        self._depths = tuple(depths)
        self._next = itertools.cycle(self._depths)

    def leaves_heads(self) -> bool:
        """Returns True if texts begin without the drafting heads."""
        return self._depths[0] == 1

    def begin(self, confidence_M: Sequence[float] | None) -> None:
        """Begins new texts, with the first depth for the pass that reads them."""
        del confidence_M
        self._next = itertools.cycle(self._depths)
        next(self._next)

    def depth(self) -> int:
        """The depth of the next forward pass."""
        return next(self._next)

    def passes(self) -> int:
        """The number of forward passes of that depth: one."""
        return 1

    def saw(
        self, depth: int, accepted_N: np.ndarray, passes: int, seconds: float
    ) -> None:
        """Takes no notice of the result of a pass."""

    def saw_entropy(self, entropy: float) -> None:
        """Takes no notice of the entropy."""


class DepthChooser:
    """Picks the depth that promises the most tokens a second.

    The next batch of the same shape begins with what the last one has shown.
    """

    def __init__(self, cost_s: dict[int, float]):
        """Takes the seconds of a pass by depth, of 1 and others."""
        self.cost_s = cost_s
        drafting = max(cost_s) - 1
        self._accepted_M = np.zeros(drafting)  # passes that accepted 1, 2 ... drafts
        self._seen_M = np.zeros(drafting)  # passes that had so many drafts
        self._last = 0  # the depth before; 0: these texts have had none
        self._stretch_s = 0.0
        self._trial = False  # heads are asked again, not knowing whether it pays
        self._alone = 0  # passes at depth 1 since the heads were last asked
        self._alone_s = 0.0  # seconds that these took
        self._patience = _PATIENCE  # passes at depth 1 before they are asked again
        self._entropy: float | None = None  # of head 1, when they were left

    def leaves_heads(self) -> bool:
        """Returns True if new texts begin without the drafting heads.

        Then they cannot pay, or did not pay for the texts before.
        """
        if not self._can_pay():
            return True
        if np.any(self._seen_M < _KNOWN) or self._due():
            return False
        return self._best(self._accepted_M / self._seen_M) == 1

    def stays_alone(self, tokens: int) -> bool:
        """Returns True if texts of so many tokens end before the heads could be asked.

        Then there is no need to keep what the heads would have to catch up with.
        """
        return self.leaves_heads() and not self._due(tokens)

    def begin(self, confidence_M: Sequence[float] | None) -> None:
        """Begins new texts, given how likely their first drafts are by their own heads.

        That is all there is to go by before any draft was verified. None: the heads
        are left alone.
        """
        if confidence_M is None:  # as before, which need not be looked at so soon
            self._last, self._stretch_s = 1, _LONGEST_S
            return
        self._last = 0
        fade = np.minimum(1.0, _BEFORE / np.maximum(self._seen_M, 1.0))
        guess_M = np.cumprod(np.asarray(confidence_M, float))
        self._accepted_M = fade * self._accepted_M + _GUESS * guess_M
        self._seen_M = fade * self._seen_M + _GUESS

    def depth(self) -> int:
        """Chooses the depth of the next stretch."""
        chosen = self._best(self._accepted_M / np.maximum(self._seen_M, 1.0))
        # Drafts may be accepted more often by now: look again, ever more rarely.
        self._trial = chosen == 1 and self._due()
        if self._trial:
            chosen = self._best(np.ones_like(self._accepted_M))
        # Looking takes time, too: while nothing changes it is done ever more rarely.
        # A depth by the heads' own confidence alone is believed for a moment.
        if self._last == 0 and chosen > 1:
            self._stretch_s = 0.0
        elif chosen == self._last:
            self._stretch_s = min(max(2 * self._stretch_s, _STRETCH_S), _LONGEST_S)
        else:
            self._stretch_s = _STRETCH_S
        self._last = chosen
        return chosen

    def passes(self) -> int:
        """The number of forward passes of the next stretch."""
        if self._trial:
            return _TRIAL
        return max(_FEWEST, int(self._stretch_s / self.cost_s[self._last]))

    def _best(self, accepted_M: np.ndarray) -> int:
        """The depth that pays if 1, 2 ... drafts are accepted so often; else 1."""

        def speed(depth: int) -> float:
            return (1.0 + float(accepted_M[: depth - 1].sum())) / self.cost_s[depth]

        best = max(self.cost_s, key=speed)
        return best if speed(best) > _GAIN * speed(1) else 1

    def _due(self, tokens: int = 0) -> bool:
        """Returns True if the heads are due to be asked, after so many more passes."""
        passes = self._alone + tokens
        seconds = self._alone_s + tokens * self.cost_s[1]
        waited = passes >= self._patience and seconds >= _LEAST_ALONE_S
        return waited and self._can_pay()

    def _can_pay(self) -> bool:
        """Returns True if drafts would pay if all of them were accepted."""
        return self._best(np.ones_like(self._accepted_M)) > 1

    def saw(
        self, depth: int, accepted_N: np.ndarray, passes: int, seconds: float
    ) -> None:
        """Takes the result of a stretch at a depth.

        Args:
          depth: the depth of its passes.
          accepted_N: how often 0, 1 ... drafts were accepted, over passes and texts.
          passes: the number of passes.
          seconds: the time that they took.
        """
        # A machine that is slower now, or a longer cache, is so at every depth.
        off = min(seconds / passes / self.cost_s[depth], 2.0) - 1.0
        self.cost_s = {d: s * (1.0 + 0.1 * off) for d, s in self.cost_s.items()}
        self.cost_s[depth] *= 1.0 + 0.1 * off
        if depth == 1:
            self._alone += passes
            self._alone_s += seconds
            return
        if self._alone:  # the heads were asked again, for better or for worse
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
            self._alone, self._alone_s, self._entropy = 0, 0.0, None
        fade = 0.5 ** (passes / _MEMORY)
        for i in range(1, depth):
            accepted, tried = float(accepted_N[i:].sum()), float(accepted_N.sum())
            if tried:
                self._accepted_M[i - 1] = fade * self._accepted_M[i - 1] + accepted * (
                    passes / tried
                )
                self._seen_M[i - 1] = fade * self._seen_M[i - 1] + passes

    def saw_entropy(self, entropy: float) -> None:
        """Takes head 1's recent min-entropy, in nats, at depth 1."""
        if self._entropy is None or self._alone <= 2 * CATCH_UP:
            self._entropy = entropy
        elif entropy < _CALMER * self._entropy:
            self._alone = max(self._alone, self._patience)


_BATCH_SPEC = spec("batch", None, None)
_TOKEN_SPEC = spec("batch", None)


def _unknown() -> jax.Array:
    """The entropy that means: not known yet."""
    return -jnp.ones(())


def _entropy(logits_BWV: jax.Array) -> jax.Array:
    """Min-entropies, -log of the largest probability, in nats, float32 [B, W].

    Of the entropies (Renyi 1961, section 1) the one that takes least to compute.
    """
    exp_BWV = jnp.exp(logits_BWV - jnp.max(logits_BWV, axis=-1, keepdims=True))
    # The sum as a product with ones: on a CPU a reduction of a batch takes far longer.
    one_V = jnp.ones(logits_BWV.shape[-1], out_sharding=spec("vocab"))
    return jnp.log(jnp.einsum("bwv,v->bw", exp_BWV, one_V, out_sharding=_TOKEN_SPEC))
