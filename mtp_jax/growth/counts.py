"""The bias by the token before, from counts: of tokens, and of pairs of them.

The law of a pair, with k occurrences of every token's unigram law p added to its count
c, is p(b | a) = (c(a, b) + k p(b)) / (c(a) + k), and its logarithm

    log p(b) + log(1 + c(a, b) / (k p(b))) + a term of a alone,

which a softmax does not see. So a bias of rank r is the first term, of rank 1, and the
r - 1 largest singular values of the second, which is 0 for pairs that never occur, its
rows weighed by the square roots of their counts (arXiv:2606.12370 has the bias; that
counts begin it is our own).

Axes: V vocabulary, r rank.
"""

import dataclasses

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from mtp_jax.growth.text import FitText

_PRIOR = 8.0  # k


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often tokens occur, and pairs of them within a document."""

    token_V: np.ndarray  # float64
    pair_VV: scipy.sparse.csr_array

    @classmethod
    def of(cls, text: FitText) -> "Counts":
        """Counts of all rows of a text."""
        v = text.config.model.vocab_size
        tokens = np.zeros(v)
        pairs = scipy.sparse.csr_array((v, v))
        for batch in text.rows():
            t, s = batch["tokens"], batch["segments"]
            tokens += np.bincount(t[s > 0], minlength=v)
            both = (s[:, 1:] == s[:, :-1]) & (s[:, 1:] > 0)
            at = t[:, :-1][both], t[:, 1:][both]
            ones = np.ones(len(at[0]))
            pairs = pairs + scipy.sparse.coo_array((ones, at), shape=(v, v)).tocsr()
        return cls(tokens, pairs)

    def unigram(self) -> np.ndarray:
        """Probabilities of tokens, half an occurrence added to each, float64 [V]."""
        return (self.token_V + 0.5) / (self.token_V.sum() + 0.5 * len(self.token_V))


def bias_of(counts: Counts, rank: int, pairs: bool) -> tuple[np.ndarray, np.ndarray]:
    """w_markov_in and w_markov_out, float64 [V, r], of a rank of at least 1.

    Without pairs they are of the unigram law alone, and what is left of the rank is 0
    on the side of the output, so that it can still learn.
    """
    p_V = counts.unigram()
    v = len(p_V)
    rng = np.random.default_rng(0)
    w_in = 0.02 * rng.standard_normal((v, rank))
    w_out = np.zeros((v, rank))
    w_in[:, 0], w_out[:, 0] = 1.0, np.log(p_V) - np.mean(np.log(p_V))
    if not pairs or rank == 1:
        return w_in, w_out
    excess = counts.pair_VV.tocoo()
    a, b = excess.coords
    values = np.log1p(excess.data / (_PRIOR * p_V[b]))
    row_V = np.sqrt(np.maximum(counts.token_V, 1.0))
    weighed = scipy.sparse.csr_array((values * row_V[a], (a, b)), shape=(v, v))
    u, s, vt = _largest(weighed, min(rank - 1, v), rng)
    half = np.sqrt(s)
    k = len(s)
    w_in[:, 1 : 1 + k] = u * half / row_V[:, None]
    w_out[:, 1 : 1 + k] = vt.T * half
    return w_in, w_out


def _largest(
    matrix: scipy.sparse.csr_array, k: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k largest singular values and their vectors: u [V, k], s [k], vt [k, V]."""
    if min(matrix.shape) <= max(1024, k + 1):
        u, s, vt = np.linalg.svd(matrix.toarray(), full_matrices=False)
        return u[:, :k], s[:k], vt[:k]
    start = rng.standard_normal(min(matrix.shape))
    u, s, vt = scipy.sparse.linalg.svds(matrix, k=k, v0=start)
    return u[:, ::-1], s[::-1], vt[::-1]
