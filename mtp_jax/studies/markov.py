"""A source of which every law is known: a Markov chain, and what heads can do on it.

Axes: V states, R rows, T tokens of a row.
"""

import itertools

import numpy as np


def chain(seed: int, states: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Transition probabilities [V, V] and the stationary law [V]."""
    p_VV = np.random.default_rng(seed).dirichlet(np.full(states, 0.3), size=states)
    p_VV = (p_VV + 1e-9) / (p_VV + 1e-9).sum(axis=1, keepdims=True)
    # The left eigenvector of eigenvalue 1, by solving law (P - 1) = 0, sum = 1.
    a = np.vstack([p_VV.T - np.eye(states), np.ones(states)])
    law_V = np.linalg.lstsq(a, np.append(np.zeros(states), 1.0), rcond=None)[0]
    return p_VV, law_V


def text(
    p_VV: np.ndarray,
    law_V: np.ndarray,
    rng: np.random.Generator,
    rows: int,
    length: int,
) -> np.ndarray:
    """Rows drawn from a chain, int64 [R, T]."""
    draws_RT = rng.random((rows, length))
    ends_VV, ends_V = np.cumsum(p_VV, axis=1), np.cumsum(law_V)
    last = len(law_V) - 1
    tokens_RT = np.zeros((rows, length), np.int64)
    tokens_RT[:, 0] = np.minimum(np.searchsorted(ends_V, draws_RT[:, 0]), last)
    for t in range(1, length):
        ends_RV = ends_VV[tokens_RT[:, t - 1]]
        here_R = (draws_RT[:, t, None] > ends_RV).sum(axis=1)
        tokens_RT[:, t] = np.minimum(here_R, last)
    return tokens_RT


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, in nats."""
    return -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), axis=-1)


def least_loss(p_VV: np.ndarray, law_V: np.ndarray, i: int) -> float:
    """The least cross entropy of head i, in nats: sum_a pi_a H(P^i(a, .))."""
    return float(law_V @ entropy(np.linalg.matrix_power(p_VV, i)))


def acceptance(
    p_VV: np.ndarray, law_V: np.ndarray, i: int, best: bool = False
) -> float:
    """Acceptance of the draft of a parallel head i, drawn from a law q(. | a).

    sum_a pi_a sum_b P^{i-1}(a, b) sum_x min(P(b, x), q(x | a)), where q is the exact
    law of the token, P^i(a, .), or (best) the law for which the sum is largest.
    """
    reach_VV = np.linalg.matrix_power(p_VV, i - 1)
    exact_VV = np.linalg.matrix_power(p_VV, i)
    total = 0.0
    for a, weight in enumerate(law_V):
        q_V = best_law(p_VV, reach_VV[a]) if best else exact_VV[a]
        total += weight * (reach_VV[a] @ np.minimum(p_VV, q_V).sum(axis=1))
    return float(total)


def best_law(p_VV: np.ndarray, weight_V: np.ndarray) -> np.ndarray:
    """The law q, [V], with the largest sum_b weight_b sum_x min(P(b, x), q(x)).

    The sum is concave in each q(x), with slopes that fall where q(x) passes some
    P(b, x), so mass goes to the largest slopes until it is spent.
    """
    slopes = []
    for x in range(len(p_VV)):
        levels = np.sort(np.append(p_VV[:, x], 0.0))
        for low, high in itertools.pairwise(levels):
            slopes.append((weight_V[p_VV[:, x] >= high].sum(), high - low, x))
    q_V, left = np.zeros(len(p_VV)), 1.0
    for _, width, x in sorted(slopes, reverse=True):
        q_V[x] += min(width, left)
        left -= min(width, left)
    return q_V
