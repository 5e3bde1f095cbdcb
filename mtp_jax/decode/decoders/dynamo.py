"""DynaMo's dynamic multi-token sampling (arXiv:2405.00888, algorithm 1). Lossy.

The distributions of the first m heads, multiplied and corrected by how often tokens
come together in a corpus, are a joint distribution of the next m tokens. If a run of n
tokens is likely enough it is drawn from what is left of the joint after its thresholds;
if not, one of n - 1 is tried, and so on down to one token of head 1's distribution.
Nothing is verified, so a forward pass reads only what the last one committed: 1 to n
tokens.

Choices that the source leaves open:

- Scale: a joint is not normalised, but divided by its sum where that is above 1: it is
  compared with thresholds between 0 and 1.
- Threshold: threshold^(m - 1), for cells and for backing off. The source zeroes below
  the threshold itself; then its back-off test, with the power, could never decide.
- Equal to the threshold is too little: so 0 always gives n tokens and 1 always one.
- Smoothing: none. What was never counted is masked, as in the source; where all is
  masked the run is shorter, but for threshold 0, whose joint then stays uncorrected.
- Runs longer than three tokens: a Markov chain of what was counted (`ngram_ratios`).
- Size: of m heads the best min(candidates, cells^(1/m)) tokens each, so that a joint
  has at most `cells` cells.
- Blur: along every axis of the joint, 1/4 1/2 1/4, mirrored at the ends: OpenCV's
  kernel of 3. Neighbours are neighbours in rank.
- Otsu: every split of the sorted values is tried, so there are no bins to choose.
- Repetition penalty: a cell's weight is divided once for each of its tokens that the
  text, or the cell before it, has already.
- Greedy: the heads' distributions at temperature 1, and the likeliest cell.

A token deviates if exact rejection by head 1 would have refused it: with probability
1 - min(1, p / q), q being its distribution given the tokens before it, p head 1's. The
share of deviations is the distance of the two distributions in total variation; for
greedy decoding, the share of tokens that are not head 1's most likely.

Axes: N heads, B batch, V vocabulary, K candidates, E tokens of a text, X places to draw
from: tokens of the vocabulary, or cells of a joint.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.decode.cache import (
    at_slot,
    chain,
    decode_trunk,
)
from mtp_jax.decode.decode_model import DecodeModel
from mtp_jax.decode.decoders.ngram_ratios import (
    Tables,
    check_correction,
    log_joint_ratio,
    read_tables,
)
from mtp_jax.decode.decoders.sampling import Sampler
from mtp_jax.decode.decoders.state import (
    DecodeState,
    PromptEnd,
    commit,
    head_probs,
    next_logits,
    option,
    target_probs,
)
from mtp_jax.decode.drafting import Anchor, Drafting
from mtp_jax.decode.head_passes import read_first
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Unread:
    """The tokens that the next forward pass reads: all that the last one committed."""

    count_B: jax.Array  # int32
    q_BN: jax.Array  # the probability that each was drawn with, float32
    seen_BV: jax.Array | None  # `DecodeState.seen_BV` without them


@dataclasses.dataclass(frozen=True)
class Dynamo:
    """Draws runs of 1 to n tokens from the heads' corrected joint law; lossy."""

    counts: str = option("", "file of the verb count")
    threshold: float = option(0.5, "0: always n tokens a pass; 1: always one")
    alpha: float = option(1.0, "power of the co-occurrence correction; 0: none")
    otsu: bool = option(True, "Otsu's threshold of the blurred joint")
    candidates: int = option(50, "most tokens of a head that are considered")
    cells: int = option(16384, "most runs that are considered")

    lossy: ClassVar[bool] = True
    at_once: ClassVar[bool] = True  # it needs the laws of all heads at once
    unverified: ClassVar[bool] = True  # the i-th token of a pass is head i's

    def __post_init__(self):
        check_correction(self.counts, self.alpha, self.candidates)
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it must be 0 to 1.")
        if self.cells < 1:
            raise UserError(f"cells is {self.cells}; it must be at least 1.")

    def heads(self, n: int) -> int:
        """All n heads: each predicts a token of a run."""
        return n

    def width(self, n: int) -> int:
        """n + 1: a run of up to n tokens, and one, since `finish` reads once more."""
        return n + 1

    def tables(self, fingerprint: str, vocab_size: int) -> Tables | None:
        """Reads the file of counts; None without correction."""
        return read_tables(self.counts, self.alpha, fingerprint, vocab_size)

    def begin(
        self, model: DecodeModel, state: DecodeState, end: PromptEnd
    ) -> DecodeState:
        """Commits the first run, which the heads predict at the prompt's end."""
        sampler = Sampler(state.keys, state.length_B)
        target_B1V = target_probs(state, next_logits(model, state, end.hidden_B1D))
        drafting = end.drafting(model, state)
        logits_BNV = _all_logits(model, end.hidden_B1D, drafting)
        state = dataclasses.replace(state, cache=drafting.cache)
        return self._write(model, state, target_B1V[:, 0], logits_BNV, sampler)

    def step(self, model: DecodeModel, state: DecodeState, depth: int) -> DecodeState:
        """Reads the last run, and commits one of up to `depth` tokens."""
        sampler = Sampler(state.keys, state.length_B)
        state, target_BNV, logits_BNV = _read(model, state, sampler)
        target_BV = at_slot(target_BNV, state.carry.count_B - 1)
        return self._write(model, state, target_BV, logits_BNV[:, :depth], sampler)

    def finish(self, model: DecodeModel, state: DecodeState) -> DecodeState:
        """Returns the state with the deviations of the last run marked too."""
        return _read(model, state, Sampler(state.keys, state.length_B))[0]

    def _write(
        self,
        model: DecodeModel,
        state: DecodeState,
        target_BV: jax.Array,
        logits_BNV: jax.Array,
        sampler: Sampler,
    ) -> DecodeState:
        """Draws a run from the heads' logits, and commits it."""
        probs_BNV = head_probs(state, logits_BNV)
        weight_BX, level_B, ids_BNK = self._weigh(model, state, target_BV, probs_BNV)
        if state.sampling.greedy:
            index_B = jnp.argmax(weight_BX, axis=-1).astype(jnp.int32)
        else:
            index_B = sampler.sample(weight_BX[:, None])[:, 0]
        n = len(model.heads)
        counts = self._counts(model.choices, logits_BNV.shape[1])
        tokens_BN, q_BN = _tokens(n, counts, weight_BX, level_B, ids_BNK, index_B)
        if state.sampling.greedy:
            q_BN = jnp.ones_like(q_BN)

        deviates_B1 = _deviates(
            target_BV[:, None], tokens_BN[:, :1], q_BN[:, :1], sampler
        )
        deviated_BN = jnp.pad(deviates_B1, ((0, 0), (0, n - 1)))
        after = commit(state, tokens_BN, level_B, level_B - 1, deviated_BN)
        new_B = after.length_B - state.length_B
        carry, keys = _Unread(new_B, q_BN, state.seen_BV), sampler.next_keys()
        if state.carry is not None:
            # A text that has ended is read again as it is, and with the same draws.
            carry, at_B, drawn_B = jax.tree.map(
                lambda new, old: jnp.where(_like(new_B > 0, new), new, old),
                (carry, keys.at_B, keys.drawn_B),
                (state.carry, state.keys.at_B, state.keys.drawn_B),
            )
            keys = dataclasses.replace(keys, at_B=at_B, drawn_B=drawn_B)
        else:
            carry = dataclasses.replace(carry, count_B=jnp.maximum(new_B, 1))
        return dataclasses.replace(after, carry=carry, keys=keys)

    def _counts(self, vocab: int, n: int) -> dict[int, int]:
        """Candidates of each head, by the length of a run."""
        within = {m: int(self.cells ** (1 / m) + 1e-9) for m in range(2, n + 1)}
        return {m: max(1, min(self.candidates, k, vocab)) for m, k in within.items()}

    def _weigh(
        self,
        model: DecodeModel,
        state: DecodeState,
        target_BV: jax.Array,
        probs_BNV: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The weights to draw from, the length of the run, and the candidates."""
        _, n, vocab = probs_BNV.shape
        counts = self._counts(model.choices, n)
        most = max(counts.values(), default=1)
        places = max([vocab, *(k**m for m, k in counts.items())])

        def one(tables, penalty, target_V, probs_NV, seen_V):
            probs_NK, ids_NK = lax.top_k(probs_NV, most)
            seen_NK = None if seen_V is None else seen_V[ids_NK]
            weight_X, level = jnp.pad(target_V, (0, places - vocab)), jnp.int32(1)
            for m, k in counts.items():
                ids = list(ids_NK[:m, :k])
                log_joint = self._left(tables, jnp.log(probs_NK[:m, :k]), ids)
                if seen_NK is not None:
                    again = _repeated(ids, list(seen_NK[:m, :k]))
                    log_joint -= jnp.log(penalty) * again
                weight, lives = self._judged(log_joint, m)
                weight = jnp.pad(weight.reshape(-1), (0, places - k**m))
                weight_X = jnp.where(lives, weight, weight_X)
                level = jnp.where(lives, m, level)
            return weight_X, level, ids_NK

        row, whole = spec("batch", None), spec("batch", None, None)
        seen_spec = None if state.seen_BV is None else row
        rows = jax.shard_map(
            jax.vmap(one, in_axes=(None, None, 0, 0, 0)),
            in_specs=(jax.P(), jax.P(), row, whole, seen_spec),
            out_specs=(row, spec("batch"), whole),
        )
        target_BV = jax.sharding.reshard(target_BV, row)
        return rows(
            model.tables, state.sampling.penalty, target_BV, probs_BNV, state.seen_BV
        )

    def _left(self, tables, log_probs_NK, ids):
        """The log of a joint distribution after its thresholds, an axis a head."""
        m = len(ids)
        log_joint = sum(_along(log_probs_NK[i], i, m) for i in range(m))
        if self.alpha > 0:
            corrected = log_joint + self.alpha * log_joint_ratio(tables, ids)
            if self.threshold == 0:
                nothing = jnp.max(corrected) == -jnp.inf
                corrected = jnp.where(nothing, log_joint, corrected)
            log_joint = corrected
        log_joint -= jnp.maximum(jax.nn.logsumexp(log_joint), 0.0)
        log_joint = jnp.where(log_joint > self._bound(m), log_joint, -jnp.inf)
        if self.otsu:
            top = jnp.maximum(jnp.max(log_joint), jnp.finfo(jnp.float32).min)
            scaled = jnp.exp(log_joint - top)
            log_joint = jnp.where(
                scaled < jnp.minimum(otsu(blur(scaled)), 1.0), -jnp.inf, log_joint
            )
        return log_joint

    def _judged(self, log_joint, m):
        """Weights, the largest of them 1, and True if the run is likely enough."""
        top = jnp.max(log_joint)
        lives = top > self._bound(m)
        return jnp.exp(log_joint - jnp.where(lives, top, 0.0)), lives

    def _bound(self, m: int) -> float:
        """The log probability that a run of m tokens must exceed."""
        return (m - 1) * math.log(self.threshold) if self.threshold else -math.inf


def blur(x: jax.Array) -> jax.Array:
    """Blurs by 1/4 1/2 1/4 along every axis, mirrored at the ends without repeats."""
    for axis in range(x.ndim):
        if x.shape[axis] > 1:
            ends = [(1, 1) if i == axis else (0, 0) for i in range(x.ndim)]
            y = jnp.moveaxis(jnp.pad(x, ends, mode="reflect"), axis, 0)
            x = jnp.moveaxis((y[:-2] + 2 * y[1:-1] + y[2:]) / 4, 0, axis)
    return x


def otsu(x: jax.Array) -> jax.Array:
    """The least value of the upper class: the split of least variance within (Otsu)."""
    sorted_X = jnp.sort(x.reshape(-1))
    n = sorted_X.size
    if n == 1:
        return sorted_X[0]
    lower_X = jnp.cumsum(sorted_X)[:-1]
    count_X = jnp.arange(1, n, dtype=jnp.float32)
    apart_X = jnp.sum(sorted_X) * (count_X / n) - lower_X
    between_X = apart_X**2 / (count_X * (n - count_X))
    return sorted_X[jnp.argmax(between_X) + 1]


def _read(
    model: DecodeModel, state: DecodeState, sampler: Sampler
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Reads the unread tokens and marks which of them deviate.

    Returns the state, head 1's distribution after each token, [B, N, V], and all heads'
    logits at the last, [B, N, V].
    """
    unread, n = state.carry, len(model.heads)
    start_B = state.length_B - unread.count_B
    tokens_BN = jnp.stack([at_slot(state.tokens_BE, start_B + i) for i in range(n)], 1)
    new = chain(tokens_BN, start_B)
    trunk_BND, cache = decode_trunk(model, new, state.cache)
    head_BND, source_BNX, cache = read_first(model, trunk_BND, new, cache)
    last_B = unread.count_B - 1
    anchor = Anchor(source_BNX, new, last_B, state.tokens_BE)
    drafting = Drafting(model, anchor, cache)
    last_B1D = at_slot(head_BND, last_B)[:, None]
    logits_BNV = _all_logits(model, last_B1D, drafting)
    before = dataclasses.replace(state, seen_BV=unread.seen_BV)
    target_BNV = target_probs(state, next_logits(model, before, head_BND, new))

    deviates_BM = _deviates(
        target_BNV[:, :-1], tokens_BN[:, 1:], unread.q_BN[:, 1:], sampler
    )
    # Of a text that has ended this is done again, with the same draws.
    offset_BE = jnp.arange(state.tokens_BE.shape[1])[None] - start_B[:, None]
    here_BEM = offset_BE[:, :, None] == jnp.arange(1, n)[None, None]
    here_BEM &= (jnp.arange(1, n)[None] < unread.count_B[:, None])[:, None]
    mark_BE = jnp.any(here_BEM & deviates_BM[:, None], axis=2).astype(jnp.int32)
    assert state.deviated_BE is not None, "the decoder is lossy"
    deviated_BE = jnp.maximum(state.deviated_BE, mark_BE)
    state = dataclasses.replace(state, cache=drafting.cache, deviated_BE=deviated_BE)
    return state, target_BNV, logits_BNV


def _all_logits(
    model: DecodeModel, hidden_B1D: jax.Array, drafting: Drafting
) -> jax.Array:
    """Logits of all heads, float32 [B, N, V], head 1's from its normed output."""
    hidden_BND = jnp.concatenate([hidden_B1D, drafting.all_hidden()], axis=1)
    return model.logits(hidden_BND, range(len(model.heads)))


def _tokens(n, counts, weight_BX, level_B, ids_BNK, index_B):
    """The tokens that a place stands for, [B, n], and the probability of each."""

    def one(weight_X, level, ids_NK, index):
        tokens_N = jnp.zeros(n, jnp.int32).at[0].set(index)
        q_N = jnp.ones(n).at[0].set(weight_X[index] / jnp.sum(weight_X))
        for m, k in counts.items():
            ranks = jnp.unravel_index(jnp.minimum(index, k**m - 1), (k,) * m)
            mass = weight_X[: k**m].reshape((k,) * m)
            masses = []
            for i in range(m, 0, -1):  # of all cells that begin like this one
                masses.append(mass[ranks[:i]])
                mass = jnp.sum(mass, axis=-1)
            masses.append(mass)
            for i in range(m):
                q = masses[m - 1 - i] / masses[m - i]
                tokens_N = tokens_N.at[i].set(
                    jnp.where(level == m, ids_NK[i, ranks[i]], tokens_N[i])
                )
                q_N = q_N.at[i].set(jnp.where(level == m, q, q_N[i]))
        return tokens_N, q_N

    row, each = spec("batch", None), spec("batch")
    rows = jax.shard_map(
        jax.vmap(one),
        in_specs=(row, each, spec("batch", None, None), each),
        out_specs=(row, row),
    )
    return rows(weight_BX, level_B, ids_BNK, index_B)


def _deviates(
    target_BWV: jax.Array, tokens_BW: jax.Array, q_BW: jax.Array, sampler: Sampler
) -> jax.Array:
    """Marks tokens, drawn with probability q, that exact rejection refuses, [B, W]."""
    if not tokens_BW.shape[1]:
        return tokens_BW > 0
    is_token_BWV = tokens_BW[:, :, None] == jnp.arange(target_BWV.shape[-1])[None, None]
    p_BW = jnp.sum(jnp.where(is_token_BWV, target_BWV, 0.0), axis=-1)
    yes_BW = jnp.minimum(p_BW / q_BW, 1.0)
    return sampler.sample(jnp.stack([yes_BW, 1.0 - yes_BW], axis=-1)) == 1


def _along(x_K: jax.Array, axis: int, m: int) -> jax.Array:
    """A vector as axis `axis` of an array of m axes."""
    return jnp.expand_dims(x_K, tuple(i for i in range(m) if i != axis))


def _repeated(ids: list[jax.Array], seen: list[jax.Array]) -> jax.Array:
    """The number of tokens of each cell that came before it or within it, int32."""
    m = len(ids)
    count: Any = 0
    for i in range(m):
        again = _along(seen[i], i, m)
        for j in range(i):
            again = again | (_along(ids[j], j, m) == _along(ids[i], i, m))
        count = count + again.astype(jnp.int32)
    return count


def _like(mask_B: jax.Array, x: jax.Array) -> jax.Array:
    """A mask of rows with as many axes as x."""
    return mask_B[:, None] if x.ndim == 2 else mask_B
