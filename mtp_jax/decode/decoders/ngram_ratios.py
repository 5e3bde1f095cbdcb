"""Ratios of n-gram frequencies, which correct joint distributions of tokens.

The ratio of a run x_1 ... x_m is phat(x_1 ... x_m) / prod_i phat(x_i): how much more
often its tokens come together than if they were independent. Runs longer than what was
counted are taken as a Markov chain of the longest counted ones, by the chain rule.
Nothing is smoothed: what was never seen has ratio 0.

Axes: V vocabulary, E entries, R rows, X any shape.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtp_jax.data.ngram_counts import NGrams, load
from mtp_jax.errors import UserError

Array = jax.Array | np.ndarray
_BACK_OFF = 0.4  # stupid back-off (Brants et al. 2007, section 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrequencyLevel:
    """Runs of one length, as in `ngram_counts.CountLevel`, with log frequencies."""

    start_R: Array  # int32
    token_E: Array  # int32
    log_freq_E: Array  # float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """Log frequencies of runs of 1, 2 and 3 tokens, for a compiled program."""

    log_freq_V: Array  # of single tokens, float32
    pairs: FrequencyLevel
    triples: FrequencyLevel | None


def check_correction(counts: str, alpha: float, candidates: int) -> None:
    """Checks the fields of a decoder that corrects joint distributions.

    Raises:
      UserError: naming the field.
    """
    if not 0 <= alpha < math.inf:
        raise UserError(f"alpha is {alpha}; it must be 0 or more.")
    if candidates < 1:
        raise UserError(f"candidates is {candidates}; it must be at least 1.")
    if alpha and not counts:
        raise UserError(
            "counts is empty; give the file that `mtp-jax count --input=CORPUS "
            "--output=FILE` writes, or alpha=0 for no correction."
        )


def read_tables(
    path: str, alpha: float, fingerprint: str, vocab_size: int
) -> Tables | None:
    """Reads the tables of a file of `count`, for a model of `vocab_size` ids.

    Returns None if alpha is 0: then nothing is corrected.

    Raises:
      UserError: no such file, one that does not fit, or one that is too large.
    """
    if alpha == 0:
        return None
    return tables_of(load(path, fingerprint), vocab_size)


def tables_of(ngrams: NGrams, vocab_size: int) -> Tables:
    """Turns counts into log frequencies, arrays of 32 bits.

    Raises:
      UserError: too many runs for that.
    """
    if max(level.token_E.size for level in ngrams.levels) >= 2**31:
        raise UserError("a table of counts has 2^31 runs or more; count fewer texts.")
    spare = vocab_size - ngrams.count_V.size  # the model may have ids to spare
    count_V = np.pad(ngrams.count_V, (0, spare))
    levels: list[FrequencyLevel] = []
    for level in ngrams.levels:
        rows = vocab_size if not levels else level.start_R.size - 1
        start_R = np.pad(level.start_R, (0, rows + 1 - level.start_R.size), "edge")
        # One more entry that no row has: a gather must find something.
        token_E, count_E = np.append(level.token_E, 0), np.append(level.count_E, 1)
        freq = _log_freq(count_E, level.count_E.sum())
        levels.append(
            FrequencyLevel(start_R.astype(np.int32), token_E.astype(np.int32), freq)
        )
    log_freq_V = _log_freq(count_V, count_V.sum())
    return Tables(log_freq_V, levels[0], levels[1] if len(levels) > 1 else None)


def _log_freq(count: np.ndarray, total: int) -> np.ndarray:
    """log(count / total), float32; -inf for a count of 0."""
    with np.errstate(divide="ignore"):
        return (np.log(count) - np.log(max(int(total), 1))).astype(np.float32)


def find(level: FrequencyLevel, row_X: jax.Array, token_X: jax.Array) -> jax.Array:
    """The index of a token in a row, int32; -1 if it is not there, or the row is -1.

    Rows and tokens are broadcast; the number of axes must be the same.
    """
    row_X, token_X = jnp.broadcast_arrays(row_X, token_X)
    at_X = jnp.maximum(row_X, 0)
    low_X, end_X = level.start_R[at_X], level.start_R[at_X + 1]
    last = level.token_E.size - 1

    def halve(_, bounds):
        low_X, high_X = bounds
        middle_X = low_X + (high_X - low_X) // 2
        open_X = low_X < high_X
        less_X = open_X & (level.token_E[jnp.minimum(middle_X, last)] < token_X)
        low_X = jnp.where(less_X, middle_X + 1, low_X)
        return low_X, jnp.where(open_X & ~less_X, middle_X, high_X)

    steps = level.token_E.size.bit_length()
    low_X, _ = lax.fori_loop(0, steps, halve, (low_X, end_X))
    there_X = (low_X < end_X) & (level.token_E[jnp.minimum(low_X, last)] == token_X)
    return jnp.where(there_X & (row_X >= 0), low_X, -1)


def log_joint_ratio(tables: Tables, ids: list[jax.Array]) -> jax.Array:
    """Log ratio of every run of one candidate of each position, float32.

    Args:
      tables: the counts.
      ids: of each of m >= 2 positions its candidates, int32 [candidates].

    Returns:
      An array of m axes, an axis a position; -inf where the counts have no such run.
    """
    m = len(ids)

    def spread(x, first):
        """Axes of x as those of the positions from `first` on."""
        return jnp.expand_dims(x, (*range(first), *range(first + x.ndim, m)))

    single = [tables.log_freq_V[x] for x in ids]
    pair = [_pair_at(tables, ids[i], ids[i + 1]) for i in range(m - 1)]
    log_freq = [_log_freq_at(tables.pairs, at_KK) for at_KK in pair]
    total = spread(log_freq[0] - single[0][:, None] - single[1][None], 0)
    for i in range(2, m):
        if tables.triples is None:
            before_K, run_KK = single[i - 1], log_freq[i - 1]
            term = run_KK - before_K[:, None] - single[i][None]
            total = _plus(total, spread(_unless(term, run_KK), i - 1))
        else:
            row_KK1, id_11K = pair[i - 2][..., None], ids[i][None, None]
            run_KKK = _log_freq_at(
                tables.triples, find(tables.triples, row_KK1, id_11K)
            )
            term = run_KKK - log_freq[i - 2][..., None] - single[i][None, None]
            total = _plus(total, spread(_unless(term, run_KKK), i - 2))
    return _unless(total, total)


def log_next_ratio(
    tables: Tables, before: jax.Array, last: jax.Array, ids_K: jax.Array
) -> jax.Array:
    """Log ratio of phat(x | the two tokens before) and phat(x), float32 [K].

    Where the longer run was never seen the shorter one is asked, at a discount: for a
    proposal, unlike for a text, no candidate need be ruled out.

    Args:
      tables: the counts.
      before: the token before the last, int32 [].
      last: the last token, int32 [].
      ids_K: candidates.
    """
    single_K = tables.log_freq_V[ids_K]
    pair_K = _log_freq_at(tables.pairs, find(tables.pairs, last[None], ids_K))
    discount = math.log(_BACK_OFF)
    shorter_K = jnp.where(
        pair_K > -jnp.inf, pair_K - tables.log_freq_V[last] - single_K, discount
    )
    if tables.triples is None:
        return shorter_K
    row = find(tables.pairs, before, last)
    triple_K = _log_freq_at(tables.triples, find(tables.triples, row[None], ids_K))
    longer_K = triple_K - _log_freq_at(tables.pairs, row) - single_K
    return jnp.where(triple_K > -jnp.inf, longer_K, shorter_K + discount)


def _pair_at(tables: Tables, a_K: jax.Array, b_K: jax.Array) -> jax.Array:
    """The indices of the pairs of two lists of tokens, int32 [K, K]; -1: none."""
    return find(tables.pairs, a_K[:, None], b_K[None])


def _log_freq_at(level: FrequencyLevel, at_X: jax.Array) -> jax.Array:
    """Log frequencies at indices; -inf for an index of -1."""
    return jnp.where(at_X >= 0, level.log_freq_E[jnp.maximum(at_X, 0)], -jnp.inf)


def _unless(x: jax.Array, run: jax.Array) -> jax.Array:
    """x where the run was seen; -inf, and not the nan of inf - inf, elsewhere."""
    return jnp.where(run > -jnp.inf, x, -jnp.inf)


def _plus(a: jax.Array, b: jax.Array) -> jax.Array:
    """a + b; -inf where one of them is."""
    return jnp.where((a > -jnp.inf) & (b > -jnp.inf), a + b, -jnp.inf)
