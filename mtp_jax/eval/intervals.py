"""pass@k, and intervals by resampling problems.

Axes: P problems, S samples of a problem, R resamples, G runs or temperatures.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.special

RESAMPLES = 2000
LEVEL = 0.95


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The probability that one of k samples passes, estimated without bias.

    1 - C(n - c, k) / C(n, k) of n samples of which c passed (Chen et al. 2021,
    arXiv:2107.03374, equation 1).

    Args:
      samples: n.
      passed: c.
      k: at most n.
    """
    assert 0 <= passed <= samples and 1 <= k <= samples
    # math.comb is exact, and 0 where fewer than k samples failed.
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def share_interval(of: int, total: int) -> tuple[float, float, float]:
    """A share of trials, and the ends of its exact 95% interval.

    Of Clopper and Pearson (1934): the shares with which so few, or so many, of that
    many independent trials have a probability of 2.5% or more.
    """
    assert 0 <= of <= total and total > 0
    tail = (1 - LEVEL) / 2
    low = scipy.special.betaincinv(of, total - of + 1, tail) if of else 0.0
    high = scipy.special.betaincinv(of + 1, total - of, 1 - tail) if of < total else 1.0
    return of / total, float(low), float(high)


@functools.lru_cache(maxsize=2)
def _resampled(problems: int) -> np.ndarray:
    """How often each resample of the problems takes each of them, float32 [R, P].

    Always the same for so many problems: figures are, and comparisons are paired.
    """
    rng = np.random.default_rng(0)
    equal_P = np.full(problems, 1 / problems)
    return rng.multinomial(problems, equal_P, size=RESAMPLES).astype(np.float32)


def mean_interval(
    values_P: np.ndarray, weights_P: np.ndarray | None = None
) -> tuple[float, float, float]:
    """The mean over problems, weighted or not, and the ends of its 95% interval.

    The percentile bootstrap over problems (Efron and Tibshirani 1993, chapter 13).
    """
    values_P = np.asarray(values_P, np.float64)
    if weights_P is None:
        return statistic_interval(values_P[None], lambda mean_GR: mean_GR[0])
    weighted_GP = np.stack([values_P * weights_P, weights_P])
    return statistic_interval(weighted_GP, lambda mean_GR: mean_GR[0] / mean_GR[1])


def best_interval(values_GP: np.ndarray) -> tuple[float, float, float]:
    """The best of several means over the same problems, and its 95% interval.

    Every resample chooses its best anew, as the choice is a part of what is measured.
    """
    return statistic_interval(values_GP, lambda mean_GR: np.max(mean_GR, axis=0))


def difference_interval(
    values_P: np.ndarray, base_P: np.ndarray, weights_P: np.ndarray | None = None
) -> tuple[float, float, float]:
    """The mean of paired differences, and the ends of its 95% interval."""
    return mean_interval(np.asarray(values_P) - np.asarray(base_P), weights_P)


def statistic_interval(
    values_GP: np.ndarray, of_means: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float, float]:
    """A statistic of means over problems, and the ends of its 95% interval.

    Args:
      values_GP: values of every problem.
      of_means: from means, float64 [G, R], to the statistic of each resample, [R].
    """
    values_GP = np.asarray(values_GP, np.float64)
    problems = values_GP.shape[1]
    estimate = of_means(values_GP.mean(axis=1, keepdims=True))[0]
    blocks = np.array_split(_resampled(problems), 20)  # wider ones, a few at a time
    sum_GR = np.concatenate([values_GP @ block_RP.T for block_RP in blocks], axis=1)
    mean_GR = sum_GR / problems
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(of_means(mean_GR), [tail, 1 - tail])
    return float(estimate), float(low), float(high)


def series_interval(
    values: Sequence[float], blocks: int = 20
) -> tuple[float, float, float]:
    """The mean of a series of dependent values, and the ends of its 95% interval.

    The series is cut into blocks of consecutive values, whose means are nearly
    independent where blocks are longer than the dependence (the method of batch means;
    Conway 1963), and blocks are resampled.

    Args:
      values: in their order, at least one.
      blocks: at most; no more than there are values.
    """
    parts = np.array_split(np.asarray(values, np.float64), min(blocks, len(values)))
    weights_P = np.array([len(part) for part in parts], np.float64)
    return mean_interval(np.array([part.mean() for part in parts]), weights_P)
