"""Sources, floors and identities of the studies, by second implementations."""

import itertools
import math

import jax
import jax.numpy as jnp
import markov as by_hand
import numpy as np
import pytest

from mtp_jax.studies import identities, markov, notebook, progressions
from mtp_jax.studies.study import Trial


def test_the_chain_has_its_law_and_floors():
    p_VV, law_V = markov.chain(1482)
    other_VV, other_V = by_hand.chain()

    np.testing.assert_allclose(p_VV, other_VV, atol=1e-8)
    np.testing.assert_allclose(law_V, other_V, atol=1e-6)
    np.testing.assert_allclose(law_V @ p_VV, law_V, atol=1e-12)
    for i, best in itertools.product((2, 3, 4), (False, True)):
        expected = by_hand.acceptance(other_VV, other_V, i, best)
        assert math.isclose(
            markov.acceptance(p_VV, law_V, i, best), expected, abs_tol=1e-6
        )
    assert markov.acceptance(p_VV, law_V, 1) == pytest.approx(1.0)


def test_text_of_a_chain_has_its_transitions():
    p_VV, law_V = markov.chain(3)

    tokens_RT = markov.text(p_VV, law_V, np.random.default_rng(0), 2000, 60)

    pairs = np.zeros((4, 4))
    np.add.at(pairs, (tokens_RT[:, :-1].ravel(), tokens_RT[:, 1:].ravel()), 1)
    expected = law_V[:, None] * p_VV
    np.testing.assert_allclose(pairs / pairs.sum(), expected, atol=0.006)
    first = np.bincount(tokens_RT[:, 0], minlength=4) / 2000
    np.testing.assert_allclose(first, law_V, atol=0.05)


@pytest.mark.parametrize("seed", range(3))
def test_identities_hold_to_rounding(seed):
    found = identities.deviations(seed)

    assert set(found) == set(identities._EXACT)
    assert all(0 <= x < 1e-10 for x in found.values())


def test_identities_that_are_wrong_are_seen(monkeypatch):
    monkeypatch.setattr(markov, "least_loss", lambda p, law, i: 1.0)
    assert identities.deviations(0)["n_tokens"] > 1e-3
    monkeypatch.setattr(identities, "_relative_information", lambda p, q: 0.1)
    found = identities.deviations(0)
    assert found["relative"] > 1e-3 and found["lemma"] > 1e-3
    monkeypatch.setattr(identities, "_conditional", lambda p, q: 0.1)
    assert identities.deviations(0)["information"] > 1e-3
    monkeypatch.setattr(identities, "_crossing", lambda n: n)
    assert identities.deviations(0)["choice_points"] >= 1


def test_terms_across_a_transition_are_those_of_the_paper():
    """Six terms of a three-token loss lead to a choice's consequences, three do not."""
    assert [identities._crossing(n) for n in (1, 2, 3, 4)] == [1, 3, 6, 10]


def sequence_by_hand(start, step):
    tokens = [start]
    while len(tokens) < progressions.LENGTH:
        tokens.append((tokens[-1] + step) % progressions.VOCABULARY)
    return tuple(tokens)


def test_sequences_are_those_of_a_second_implementation():
    made = progressions.sequences(np.random.default_rng(0), 100_000)

    allowed = {sequence_by_hand(start, step) for start in range(25) for step in (1, 2)}
    found, counts = np.unique(made, axis=0, return_counts=True)
    assert {tuple(row) for row in found.tolist()} == allowed
    assert {tuple(row) for row in progressions.all_sequences().tolist()} == allowed
    assert counts.min() > 1700 and counts.max() < 2300  # 2,000 each, within 7 sigma


def test_floors_are_those_of_counting():
    """A reader who knows the source, position by position, over all sequences."""
    every = progressions.all_sequences().tolist()
    for i in (1, 2, 3):
        losses, right = [], []
        for row in every:
            for t in range(progressions.LENGTH - i):
                seen = row[: t + 1]
                next_ones = [x[t + i] for x in every if x[: t + 1] == seen]
                share = next_ones.count(row[t + i]) / len(next_ones)
                losses.append(-math.log(share))
                best = max(next_ones, key=next_ones.count)
                right.append(next_ones.count(best) / len(next_ones))
        assert progressions.least_loss(i) == pytest.approx(np.mean(losses))
        assert progressions.best_accuracy(i) == pytest.approx(np.mean(right))


def log_softmax(x):
    return x - x.max() - np.log(np.sum(np.exp(x - x.max())))


def test_the_network_is_the_notebooks_with_its_mistakes_mended():
    params = progressions.network(jax.random.key(0), heads=3)
    params = {k: np.asarray(v, np.float64) + 0.1 for k, v in params.items()}
    tokens = progressions.all_sequences()[[3, 40]]

    expected = np.zeros((3, 2, 20, 50))
    for r, row in enumerate(tokens):
        h = np.zeros(progressions.HIDDEN)
        for t, token in enumerate(row):
            x = params["w_embed"][token]
            h = np.tanh(
                params["w_input"].T @ x + params["w_state"].T @ h + params["bias"]
            )
            for n in range(3):
                logits = params["w_heads"][n].T @ h + params["bias_heads"][n]
                expected[n, r, t] = log_softmax(logits)

    single = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    found = progressions.log_probabilities(single, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    losses = [
        -np.mean(
            [
                expected[i - 1, r, t, tokens[r, t + i]]
                for r in range(2)
                for t in range(20 - i)
            ]
        )
        for i in (1, 2, 3)
    ]
    np.testing.assert_allclose(
        progressions.head_losses(found, jnp.asarray(tokens)), losses, atol=2e-4
    )


def test_accuracy_and_drafts_are_counted():
    tokens = progressions.all_sequences()
    log_q = np.full((3, 50, 20, 50), -9.0)
    for i in (1, 2, 3):
        for r, t in itertools.product(range(50), range(20)):
            target = tokens[r, t + i] if t + i < 20 else 0
            log_q[i - 1, r, t, target] = 0.0
    log_q[1, :, 5] = -9.0
    log_q[1, :, 5, 49] = 0.0  # head 2 is wrong there, but for one sequence at most

    by_position = progressions.right_by_position(log_q, tokens)

    assert [len(row) for row in by_position] == [19, 18, 17]
    assert sum(by_position[0]) == 19 and sum(by_position[2]) == 17
    wrong = np.mean(tokens[:, 7] != 49)
    assert by_position[1][5] == 1 - wrong
    assert progressions.tokens_a_pass(log_q) == pytest.approx(3 - 2 * wrong / 18)


def test_how_much_is_enough_lies_between_sizes():
    sizes = (10, 20, 40)

    assert notebook.enough(sizes, [0.95, 0.1, 0.1]) == 10
    assert notebook.enough(sizes, [0.1, 0.2, 0.3]) == 80
    assert notebook.enough(sizes, [0.8, 1.0, 1.0]) == pytest.approx(10 * 2**0.5)
    assert notebook._first(np.array([0.1, 0.91, 0.3])) == 2
    assert notebook._first(np.array([0.1, 0.2])) == 4


def trial(tmp_path, arm, size="tiny", **changed):
    return Trial(
        arm=arm, seed=0, size=size, folder=tmp_path, shared=tmp_path, **changed
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm", (*notebook.STUDY.arms("tiny"), *notebook.STUDY.more_arms)
)
def test_every_arm_of_the_notebook_learns(tmp_path, arm):
    figures = notebook.measure(trial(tmp_path, arm, steps=60))

    assert figures["loss_1"] < 0.8 * math.log(50)
    assert figures == notebook.measure(trial(tmp_path, arm, steps=60))


@pytest.mark.slow
def test_trained_networks_come_to_their_floors(tmp_path):
    figures = notebook.measure(trial(tmp_path, "three heads", "quick"))

    assert figures["off_floor"] < 0.02 and figures["off_accuracy"] < 0.02


def test_head_1_is_looked_at_as_it_then_is():
    """After each of a hundred steps, then each fifth and the last; else as before."""
    tokens = jnp.asarray(progressions.sequences(np.random.default_rng(0), 64))
    key, count = jax.random.key(0), jnp.int32(64)
    every = jnp.asarray(progressions.all_sequences())

    params, losses, accuracies = progressions.train(
        key, tokens, count, heads=2, steps=108
    )

    log_q = progressions.log_probabilities(params, every)
    last = float(progressions.head_losses(log_q, every)[0])
    np.testing.assert_allclose(float(losses[-1]), last, rtol=1e-6)
    right = np.argmax(log_q[0, :, :-1], axis=-1) == every[:, 1:]
    np.testing.assert_allclose(float(accuracies[-1]), right.mean(), rtol=1e-6)
    changes = np.flatnonzero(np.diff(losses)) + 1
    assert changes.tolist() == [*range(1, 101), 105, 107] and losses[0] > 3


def test_a_set_as_small_as_the_notebooks_is_off_the_floor_by_itself():
    """By how much a reader of its shares of steps is above the floor, and of SET."""

    def off(size):
        found = []
        for seed in range(40):
            tokens = progressions.sequences(np.random.default_rng(seed), size)
            counts = np.zeros((25, 2))
            np.add.at(counts, (tokens[:, 0], tokens[:, 1] - tokens[:, 0] - 1), 1)
            shares = counts / counts.sum(axis=1, keepdims=True)
            found.append(-np.log(shares).mean() / math.log(2) - 1)
        return np.mean(found)

    assert 0.008 < off(2000) < 0.010 and off(notebook.SET) < 0.0025


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["hard", "tv", "bias"])
def test_heads_of_the_chain_are_measured(tmp_path, arm):
    figures = identities.measure(trial(tmp_path, arm, steps=30))

    assert 0 < figures["gap"] < 1.5 and 0.3 < figures["alpha_2"] < 1
