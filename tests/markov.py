"""A source of which every law is known: a Markov chain, and drafts of its text."""

import itertools

import numpy as np


def chain(states=4):
    """Transition probabilities [V, V], and the stationary law [V].

    Drafts of the second token are accepted .714 of the time if they have its law, and
    .789 at best.
    """
    p_VV = np.random.default_rng(1482).dirichlet(np.full(states, 0.3), size=states)
    law_V = np.full(states, 1 / states)
    for _ in range(1000):
        law_V = law_V @ p_VV
    return p_VV, law_V


def text(p_VV, law_V, rng, rows, length):
    """Rows of a chain, int32 [rows, length]."""
    tokens = np.zeros((rows, length), np.int32)
    tokens[:, 0] = rng.choice(len(law_V), size=rows, p=law_V)
    sums_VV = np.cumsum(p_VV, axis=1)
    for t in range(1, length):
        draw = rng.random(rows)[:, None]
        here = (draw > sums_VV[tokens[:, t - 1]]).sum(axis=1)
        tokens[:, t] = np.minimum(here, len(law_V) - 1)
    return tokens


def acceptance(p_VV, law_V, i, best):
    """Acceptance of the draft of head i, which sees the last token of the context.

    Of the law of the token i steps on, or (best) of the law that is accepted most:
    its mass goes first where most rows of the chain have at least as much.
    """
    reach_VV = np.linalg.matrix_power(p_VV, i - 1)  # of the token before the draft
    total = 0.0
    for a, weight in enumerate(law_V):
        q = p_VV.T @ reach_VV[a]
        if best:
            q = filled(p_VV, reach_VV[a])
        total += weight * (reach_VV[a] * np.minimum(p_VV, q[None]).sum(1)).sum()
    return total


def filled(p_VV, weight_V):
    """The law q with the largest sum over b of weight_b sum_x min(p_b(x), q(x))."""
    segments = []
    for x in range(len(p_VV)):
        levels = np.sort(np.append(p_VV[:, x], 0.0))
        for low, high in itertools.pairwise(levels):
            gain = weight_V[p_VV[:, x] >= high].sum()
            segments.append((gain, high - low, x))
    q, left = np.zeros(len(p_VV)), 1.0
    for _, width, x in sorted(segments, reverse=True):
        q[x] += min(width, left)
        left -= min(width, left)
    return q


def entropy_rate(p_VV, law_V):
    """Nats a token."""
    return -(law_V[:, None] * p_VV * np.log(p_VV)).sum()
