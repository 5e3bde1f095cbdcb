"""Next-token distributions, and the one place where random draws are made.

Axes: B batch, W tokens of a forward pass, V vocabulary, J draws of a forward pass.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.errors import UserError

# Logits over a temperature and a penalty stay within float32 between these.
_COLDEST, _HOTTEST, _STRONGEST = 1e-20, 1e30, 1e10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """A user's sampling settings, applied in the order of Hugging Face's generate.

    Raises:
      UserError: a setting out of range, by its name.
    """

    repetition_penalty: float = 1.0  # 1: none (CTRL, arXiv:1909.05858, section 4.1)
    temperature: float = 0.0  # 0, or less than 1e-20: the most likely token
    top_k: int = 0  # only the so many most likely; 0: all
    top_p: float = 1.0  # only the fewest that have this share (arXiv:1904.09751)
    seed: int = 0

    def __post_init__(self):
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (all) to 2^31 - 1")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(
            1 / _STRONGEST <= self.repetition_penalty <= _STRONGEST,
            "repetition_penalty",
            self.repetition_penalty,
            f"above 0, {1 / _STRONGEST:g} to {_STRONGEST:g}",
        )
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")

    @property
    def greedy(self) -> bool:
        """True if nothing is drawn: the next token is the most likely one."""
        return self.temperature < _COLDEST


def _require(ok: bool, name: str, value: float, right: str) -> None:
    """Raises UserError, naming a field, if its value is not ok."""
    if not ok:  # also where the value is not a number
        raise UserError(f"{name} is {value}; it must be {right}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """Sampling settings of a compiled program: numbers are arguments, kinds static."""

    penalty: jax.Array  # float32
    temperature: jax.Array  # float32
    top_k: jax.Array  # int32
    top_p: jax.Array  # float32
    greedy: bool = dataclasses.field(metadata={"static": True})
    filtered: bool = dataclasses.field(metadata={"static": True})
    penalized: bool = dataclasses.field(metadata={"static": True})


def sampling_arrays(sampling: Sampling, vocab_size: int) -> SamplingArrays:
    """Turns settings into arrays of one value each."""
    return SamplingArrays(
        penalty=jnp.float32(sampling.repetition_penalty),
        temperature=jnp.float32(
            1.0 if sampling.greedy else min(sampling.temperature, _HOTTEST)
        ),
        top_k=jnp.int32(sampling.top_k or vocab_size),
        top_p=jnp.float32(sampling.top_p),
        greedy=sampling.greedy,
        filtered=not sampling.greedy and (sampling.top_k > 0 or sampling.top_p < 1),
        penalized=sampling.repetition_penalty != 1,
    )


def penalize(
    sampling: SamplingArrays, logits_BWV: jax.Array, seen_BWV: jax.Array | None
) -> jax.Array:
    """Makes tokens that the text has already less likely, float32 [B, W, V] (CTRL)."""
    if not sampling.penalized or seen_BWV is None:
        return logits_BWV
    less_BWV = jnp.where(
        logits_BWV > 0, logits_BWV / sampling.penalty, logits_BWV * sampling.penalty
    )
    return jnp.where(seen_BWV, less_BWV, logits_BWV)


def probabilities(sampling: SamplingArrays, logits_BWV: jax.Array) -> jax.Array:
    """Next-token distributions of penalized logits, float32 [B, W, V].

    Greedy ones have all their mass on the most likely token, the first of equals.
    """
    if sampling.greedy:
        return jax.nn.one_hot(most_likely(logits_BWV), logits_BWV.shape[-1])
    scaled_BWV = logits_BWV / sampling.temperature
    if sampling.filtered:
        scaled_BWV = _filter(sampling, scaled_BWV)
    return jax.nn.softmax(scaled_BWV, axis=-1)


def _filter(sampling: SamplingArrays, logits_BWV: jax.Array) -> jax.Array:
    """Sets logits to -inf outside of the top k and, within these, of the top p.

    Tokens as likely as the last one that is kept are kept too.
    """
    lowest = jnp.finfo(jnp.float32).min
    vocab = logits_BWV.shape[-1]
    sorted_BWV = jnp.sort(logits_BWV, axis=-1, descending=True)
    rank_11V = jnp.arange(vocab)[None, None]
    within_BWV = jnp.where(rank_11V < sampling.top_k, sorted_BWV, lowest)
    share_BWV = jax.nn.softmax(within_BWV, axis=-1)
    # A token stays if those before it do not have the share yet; the first always.
    before_BWV = jnp.cumsum(share_BWV, axis=-1) - share_BWV
    kept_BWV = (rank_11V < sampling.top_k) & (
        (before_BWV < sampling.top_p) | (rank_11V == 0)
    )
    last_BW1 = jnp.min(jnp.where(kept_BWV, sorted_BWV, jnp.inf), -1, keepdims=True)
    return jnp.where(logits_BWV >= last_BW1, logits_BWV, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomKeys:
    """Random keys of a batch: the source of the draws of each text.

    Each draw has a key of its own: it is made of the text's key, the length of the text
    and the number of the draw at that length, which is counted here, whoever draws. So
    draws do not depend on the other texts of a batch.

    For proofs, `forced` prescribes every draw: its j-th column is the rank, by
    likelihood, of the result of the j-th draw of a forward pass; `log_prob` adds up the
    log probabilities of these results.
    """

    key_B2: jax.Array  # uint32
    forced_BJ: jax.Array | None = None  # int32
    log_prob_B: jax.Array | None = None  # float32
    at_B: jax.Array | None = None  # length at which was drawn last, int32; 0: none yet
    drawn_B: jax.Array | None = None  # draws at that length so far, int32


class Sampler:
    """Makes random draws for texts of these lengths, in the order they are asked for.

    Whoever draws next goes on with `next_keys`, so that no draw is made again.
    """

    def __init__(self, keys: RandomKeys, length_B: jax.Array):
        self._keys = keys
        self._length_B = length_B
        self._asked = 0  # by this sampler; known while tracing
        self._before_B = jnp.zeros_like(length_B)  # draws of others at these lengths
        if keys.at_B is not None and keys.drawn_B is not None:
            self._before_B = jnp.where(keys.at_B == length_B, keys.drawn_B, 0)

    def sample(self, probs_BWV: jax.Array) -> jax.Array:
        """Draws an index from each distribution, independently, int32 [B, W].

        The distributions need not be normalised.
        """
        width = probs_BWV.shape[1]
        if self._keys.forced_BJ is not None:
            return self._forced(probs_BWV, width)
        self._asked += 1

        def one(key_2, length, number, probs_WV):
            key = jax.random.wrap_key_data(key_2)
            key = jax.random.fold_in(jax.random.fold_in(key, length), number)
            noise_WV = jax.random.gumbel(key, probs_WV.shape)
            return jnp.argmax(jnp.log(probs_WV) + noise_WV, axis=-1).astype(jnp.int32)

        number_B = self._before_B + self._asked
        return jax.vmap(one)(self._keys.key_B2, self._length_B, number_B, probs_BWV)

    def _forced(self, probs_BWV: jax.Array, width: int) -> jax.Array:
        """Gives the prescribed indices, and adds up their log probabilities."""
        keys = self._keys
        assert keys.forced_BJ is not None and keys.log_prob_B is not None
        rank_BW = keys.forced_BJ[:, self._asked : self._asked + width]
        self._asked += width
        order_BWV = jnp.argsort(-probs_BWV, axis=-1)
        index_BW1 = jnp.take_along_axis(order_BWV, rank_BW[..., None], axis=-1)
        total_BW = jnp.sum(probs_BWV, axis=-1)
        prob_BW = jnp.take_along_axis(probs_BWV, index_BW1, axis=-1)[..., 0] / total_BW
        log_prob_B = keys.log_prob_B + jnp.sum(jnp.log(prob_BW), axis=1)
        self._keys = dataclasses.replace(keys, log_prob_B=log_prob_B)
        return index_BW1[..., 0].astype(jnp.int32)

    def next_keys(self) -> RandomKeys:
        """The random keys of whoever draws next: they know what was drawn."""
        if self._keys.forced_BJ is not None or not self._asked:
            return self._keys
        return dataclasses.replace(
            self._keys, at_B=self._length_B, drawn_B=self._before_B + self._asked
        )


def most_likely(logits_BTV: jax.Array) -> jax.Array:
    """The first token of the highest score, int32 [B, T].

    Two plain reductions instead of argmax: they stay on their shards when V is split,
    and compilers make vector code of them.
    """
    vocab = logits_BTV.shape[-1]
    top_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    ids_11V = jnp.arange(vocab, dtype=jnp.int32)[None, None]
    return jnp.min(jnp.where(logits_BTV == top_BT1, ids_11V, vocab - 1), axis=-1)
