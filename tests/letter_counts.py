"""Counts of runs of letters: of random documents, by the package and by plain loops."""

import collections
import functools
import types

import numpy as np

from mtp_jax.data import ngram_counts

V = 16


def documents(vocab=V, many=40, seed=0):
    """What `Corpus.documents` gives, of random tokens that repeat a lot."""
    rng = np.random.default_rng(seed)
    rows = [
        (rng.integers(0, vocab, rng.integers(1, 30)) * rng.integers(0, 2, 1)) % vocab
        + rng.integers(0, 2)
        for _ in range(many)
    ]
    rows = [np.minimum(row, vocab - 1).astype(np.uint8) for row in rows]
    return types.SimpleNamespace(
        rows=rows,
        # A shard for every seven documents.
        lengths_by_shard=lambda: (
            np.array([len(row) for row in rows[i : i + 7]], np.uint64)
            for i in range(0, many, 7)
        ),
        tokens=lambda i, start=0, stop=None: rows[i][start:stop],
    )


def counted(docs):
    """Counts of runs by their length, by plain loops."""
    counts = {m: collections.Counter() for m in (1, 2, 3)}
    for row in docs.rows:
        for m, runs in counts.items():
            for i in range(len(row) - m + 1):
                runs[tuple(map(int, row[i : i + m]))] += 1
    return counts


def frequency(runs, m, vocab=V):
    """Dense frequencies, an axis a token."""
    dense = np.zeros((vocab,) * m)
    for run, times in runs.items():
        dense[run] = times
    return dense / dense.sum()


@functools.cache
def dense_ratios(order):
    """log phat(x1 x2) / ..., and of what follows two tokens, by NumPy."""
    counts = counted(documents())
    p1, p2, p3 = (frequency(counts[m], m) for m in (1, 2, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        pair = np.log(p2) - np.log(p1)[:, None] - np.log(p1)[None]
        if order == 3:
            after = np.log(p3) - np.log(p2)[..., None] - np.log(p1)
        else:
            after = np.log(p2) - np.log(p1)[:, None] - np.log(p1)[None]
            after = np.broadcast_to(after[None], (V, V, V))
    clean = [np.where(np.isfinite(x), x, -np.inf) for x in (pair, after)]
    return clean


def ngrams(order=3, vocab=V):
    return ngram_counts.count(documents(vocab), vocab, "letters", order)
