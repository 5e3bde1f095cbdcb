"""pass@k against its definition, and intervals against many simulated models."""

import itertools

import numpy as np
import pytest

from mtp_jax.eval.intervals import (
    best_interval,
    difference_interval,
    mean_interval,
    pass_at_k,
    series_interval,
    share_interval,
)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_counts_the_draws_of_k_samples_that_have_a_right_one(n):
    for passed in range(n + 1):
        samples = [True] * passed + [False] * (n - passed)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            share = sum(map(any, draws)) / len(draws)
            assert pass_at_k(n, passed, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_samples_is_the_product_of_the_paper():
    for n, c, k in [(200, 3, 100), (200, 150, 10), (1000, 1, 999), (200, 0, 100)]:
        product = 1.0
        for i in range(n - c + 1, n + 1):
            product *= 1 - k / i
        assert pass_at_k(n, c, k) == pytest.approx(1 - product, abs=1e-12)


def test_pass_at_k_is_without_bias():
    rng = np.random.default_rng(0)
    p, k = 0.15, 5

    found = [pass_at_k(20, int(c), k) for c in rng.binomial(20, p, size=40_000)]

    assert np.mean(found) == pytest.approx(1 - (1 - p) ** k, abs=0.005)


def simulated(rng, problems, samples):
    """Chances of problems that models differ in, and passed samples of each."""
    chance_P = rng.beta(0.4, 1.2, size=problems)
    return chance_P, rng.binomial(samples, chance_P)


@pytest.mark.parametrize("k", [1, 10])
def test_intervals_of_pass_at_k_hold_the_truth_as_often_as_they_say(k):
    """The truth is the mean over all problems that there could be.

    600 simulations of 95% have a standard error of 0.9 percentage points.
    """
    rng = np.random.default_rng(1)
    draw_P = rng.beta(0.4, 1.2, size=2_000_000)
    truth = np.mean(1 - (1 - draw_P) ** k)
    held = 0
    for _ in range(600):
        _, passed_P = simulated(rng, 164, 20)
        values = np.array([pass_at_k(20, int(c), k) for c in passed_P])
        _, low, high = mean_interval(values)
        held += low <= truth <= high

    assert 0.915 <= held / 600 <= 0.98


def test_paired_intervals_hold_the_difference_and_are_narrower():
    rng = np.random.default_rng(2)
    held, paired, apart = 0, [], []
    truth = 0.05 * (1 - beta_above(0.9))
    for _ in range(400):
        chance_P = rng.beta(0.4, 1.2, size=200)
        better_P = np.minimum(chance_P + 0.05 * (chance_P < 0.9), 1.0)
        a_P, b_P = (rng.binomial(20, c) / 20 for c in (chance_P, better_P))
        _, low, high = difference_interval(b_P, a_P)
        held += low <= truth <= high
        paired.append(high - low)
        _, low, high = mean_interval(a_P)
        apart.append(high - low)

    assert 0.91 <= held / 400 <= 0.985
    assert np.mean(paired) < 0.5 * np.mean(apart)


def beta_above(x):
    """The share of chances above x, by a fine grid."""
    draws = np.random.default_rng(3).beta(0.4, 1.2, size=2_000_000)
    return float(np.mean(draws >= x))


def test_weighted_means_are_ratios_of_sums():
    values, weights = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])

    value, low, high = mean_interval(values, weights)

    assert value == pytest.approx(11 / 4)
    assert 1.0 <= low < value < high <= 4.0


def test_the_best_of_equals_is_better_than_each_by_chance():
    """Why the best temperature is told apart: choosing favours what chance favoured."""
    rng = np.random.default_rng(4)
    values_GP = rng.binomial(1, 0.3, size=(5, 100)).astype(float)

    value, low, high = best_interval(values_GP)

    assert value == pytest.approx(values_GP.mean(axis=1).max())
    one, low_one, _ = mean_interval(values_GP[0])
    assert low > low_one and value >= one
    assert low < value < high


def test_the_interval_of_a_dependent_series_covers_its_mean():
    """Values of autoregressive series resampled one by one cover it too rarely."""
    rng = np.random.default_rng(3)
    covered, naive = 0, 0
    for _ in range(200):
        noise, x = rng.normal(size=400), np.zeros(400)
        for t in range(1, 400):
            x[t] = 0.8 * x[t - 1] + noise[t]
        mean, low, high = series_interval(list(x + 5.0))
        assert abs(mean - x.mean() - 5.0) < 1e-9
        covered += low <= 5.0 <= high
        _, low, high = mean_interval(x)
        naive += low <= 0.0 <= high
    assert covered > 160 and naive < 130
    assert series_interval([2.0]) == (2.0, 2.0, 2.0)


def test_ends_of_the_interval_of_a_share_are_its_tails():
    for of, total in [(0, 5), (2, 5), (5, 5), (13, 40)]:
        share, low, high = share_interval(of, total)

        assert share == of / total
        rng = np.random.default_rng(0)
        if of:
            as_many = (rng.random((200_000, total)) < low).sum(axis=1) >= of
            assert abs(as_many.mean() - 0.025) < 0.002
        if of < total:
            as_few = (rng.random((200_000, total)) < high).sum(axis=1) <= of
            assert abs(as_few.mean() - 0.025) < 0.002
    assert share_interval(0, 5)[1] == 0.0 and share_interval(5, 5)[2] == 1.0
