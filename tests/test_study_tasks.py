"""Tasks of the studies, rings and names, by second implementations; their configs."""

import dataclasses
import functools

import numpy as np
import pytest

from mtp_jax.data.batches import train_batches
from mtp_jax.eval.outputs import HeadOutputs
from mtp_jax.studies import bytes as bytes_study
from mtp_jax.studies import (
    continuous,
    diffusion,
    induction,
    markov,
    polynomials,
    progressions,
    scaling,
)
from mtp_jax.studies.rings import Ring, longest, packed
from mtp_jax.studies.study import Trial

RINGS = [Ring(5, 2), Ring(7, 5)]


def trial(tmp_path, arm, size="tiny", **changed):
    return Trial(
        arm=arm, seed=0, size=size, folder=tmp_path, shared=tmp_path, **changed
    )


def of_numpy(ring, tokens):
    """The value of an expression in prefix notation, and the tokens after it.

    By NumPy's polynomials with integer coefficients, reduced at the end of each
    operation; composition is the sum of a_i b^i.
    """
    first, rest = tokens[0], tokens[1:]
    if first < ring.prime:
        return np.array(tokens[: ring.degree]), tokens[ring.degree :]
    a, rest = of_numpy(ring, rest)
    if first == ring.prime:
        return -a % ring.prime, rest
    b, rest = of_numpy(ring, rest)
    if first == ring.prime + 1:
        made = np.polynomial.polynomial.polyadd(a, b)
    elif first == ring.prime + 2:
        made = np.polynomial.polynomial.polymul(a, b)
    else:
        made, power = np.zeros(1, int), np.ones(1, int)
        for x in a:
            made = np.polynomial.polynomial.polyadd(made, x * power)
            power = np.polynomial.polynomial.polymul(power, b) % ring.prime
    whole = np.zeros(max(len(made), ring.degree), int)
    whole[: len(made)] = np.rint(made)
    return whole[: ring.degree] % ring.prime, rest


def assert_equal_to_numpy(ring, rng, count):
    for _ in range(count):
        operations = int(rng.integers(1, 7))
        tokens, value = ring.expression(rng, operations)
        expected, rest = of_numpy(ring, tokens)
        assert tuple(expected) == value and not rest
        assert sum(t >= ring.prime for t in tokens) == operations


@pytest.mark.parametrize("ring", RINGS)
def test_expressions_have_the_value_of_a_second_implementation(ring):
    assert_equal_to_numpy(ring, np.random.default_rng(0), 500)


@pytest.mark.slow
@pytest.mark.parametrize("ring", RINGS)
def test_many_expressions_have_the_value_of_a_second_implementation(ring):
    assert_equal_to_numpy(ring, np.random.default_rng(1), 50_000)


def assert_laws(ring, rng, count):
    zero, one = (0,) * ring.degree, (1,) + (0,) * (ring.degree - 1)
    x = (0, 1) + (0,) * (ring.degree - 2)
    for _ in range(count):
        a, b, c = (
            tuple(rng.integers(0, ring.prime, ring.degree).tolist()) for _ in range(3)
        )
        add, multiply, compose = ring.add, ring.multiply, ring.compose
        assert add(a, b) == add(b, a) and multiply(a, b) == multiply(b, a)
        assert add(add(a, b), c) == add(a, add(b, c))
        assert multiply(multiply(a, b), c) == multiply(a, multiply(b, c))
        assert multiply(a, add(b, c)) == add(multiply(a, b), multiply(a, c))
        assert add(a, ring.negate(a)) == zero and multiply(a, one) == a
        assert compose(a, x) == a and compose(x, a) == a
        assert compose(add(a, b), c) == add(compose(a, c), compose(b, c))


@pytest.mark.parametrize("ring", RINGS)
def test_laws_of_a_ring_hold(ring):
    assert_laws(ring, np.random.default_rng(0), 500)


@pytest.mark.slow
@pytest.mark.parametrize("ring", RINGS)
def test_laws_of_a_ring_hold_of_many_elements(ring):
    assert_laws(ring, np.random.default_rng(1), 50_000)


def test_problems_are_packed_whole():
    ring = Ring(5, 2)
    tokens, segments = packed(ring, np.random.default_rng(0), 20, 64, 3, pauses=2)

    most = 0
    for row_tokens, row_segments in zip(
        tokens.tolist(), segments.tolist(), strict=True
    ):
        assert row_segments[0] == 1
        for number in range(1, max(row_segments) + 1):
            problem = [
                t for t, s in zip(row_tokens, row_segments, strict=True) if s == number
            ]
            at = problem.index(ring.equals)
            value, rest = of_numpy(ring, problem[: at - 2])
            assert problem[at - 2 : at] == [ring.pause] * 2 and rest == []
            assert problem[at + 1 :] == [*value, ring.end]
            most = max(most, len(problem))
        for t, s in zip(row_tokens, row_segments, strict=True):
            assert (s == 0) == (t == ring.padding)
    assert most <= longest(ring, 3, 2) <= 64


def test_answers_are_graded_at_their_places(monkeypatch):
    ring, rng = Ring(5, 2), np.random.default_rng(0)
    problems = [ring.problem(rng, 2) for _ in range(7)]
    wrong = {(2, 0), (5, 1)}

    def outputs(model, tokens, segments):
        logits = np.zeros((1, *tokens.shape, ring.vocabulary))
        for row, problem in enumerate(problems):
            for k in range(2):
                place = problem.index(ring.equals) + k
                answer = problem[place + 1]
                said = (answer + 1) % 5 if (row, k) in wrong else answer
                logits[0, row, place, said] = 1.0
        return HeadOutputs(None, logits)

    monkeypatch.setattr(polynomials, "head_outputs", outputs)
    right = polynomials._right(None, ring, problems, longest(ring, 2, 0))

    expected = [[(row, k) not in wrong for k in range(2)] for row in range(7)]
    assert right.tolist() == expected


def test_names_come_again_as_they_were():
    for held_out in (False, True):
        tokens, known = induction.rows_of(np.random.default_rng(0), 300, 96, held_out)
        for row, marks in zip(tokens.tolist(), known.tolist(), strict=True):
            names = {}
            for t in range(1, len(row)):
                is_second = row[t] >= induction.FILLERS + induction.FIRSTS
                before = row[t - 1] - induction.FILLERS
                if not is_second:
                    assert not marks[t]
                    # A first token is followed by its second.
                    assert not 0 <= before < induction.FIRSTS
                    continue
                assert 0 <= before < induction.FIRSTS
                second = row[t] - induction.FILLERS - induction.FIRSTS
                assert marks[t] == (before in names)
                assert names.setdefault(before, second) == second
                assert ((3 * before + second) % 5 == 0) == held_out
            assert len(names) <= induction.NAMES
        assert known.mean() > 0.05


def test_no_pair_of_the_test_is_a_name_of_training():
    pairs = []
    for held_out in (False, True):
        tokens, _ = induction.rows_of(np.random.default_rng(0), 2000, 96, held_out)
        seconds = np.argwhere(tokens >= induction.FILLERS + induction.FIRSTS)
        pairs.append({(tokens[r, t - 1], tokens[r, t]) for r, t in seconds})

    assert not pairs[0] & pairs[1]
    assert len(pairs[0]) > 700 and len(pairs[1]) > 150  # of 1,024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "arm", "figure"),
    [(polynomials, "n=2", "digits"), (induction, "d=16, n=2", "seen")],
)
def test_small_sources_are_learned_from(tmp_path, study, arm, figure):
    figures = study.measure(trial(tmp_path, arm, steps=4))

    assert 0 <= figures[figure] < 0.9
    assert figures == study.measure(trial(tmp_path, arm, steps=4))


@pytest.mark.parametrize("study", [polynomials, induction, scaling, bytes_study])
def test_arms_of_a_study_are_good_configs(tmp_path, study):
    for arm in (*study.STUDY.arms("full"), *study.STUDY.more_arms):
        for size in ("tiny", "quick", "full"):
            if "V=" not in arm:  # whose corpus would be made
                cfg = study.config_of(trial(tmp_path, arm, size, data=("corpus",)))
                assert cfg.train.steps >= 1


def test_the_slope_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    arms = {
        f"d={w}, n={n}": {"bits_per_byte": rng.random()}
        for w in scaling._WIDTHS
        for n in (1, 4)
    }

    y = [
        arms[f"d={w}, n=4"]["bits_per_byte"] - arms[f"d={w}, n=1"]["bits_per_byte"]
        for w in scaling._WIDTHS
    ]
    expected, _ = np.polyfit(np.log(scaling._WIDTHS), y, 1)
    assert scaling.slope(arms, 4) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 4])
def test_epochs_go_over_the_same_rows_in_another_order(corpus_dir, tmp_path, n):
    of = trial(tmp_path, f"e=4, n={n}", steps=12, data=(str(corpus_dir),))
    cfg = scaling.config_of(of)
    make_rows = scaling.again_and_again(cfg, 4, seed=3)
    rng = np.random.default_rng(0)
    steps = [make_rows(rng) for _ in range(12)]
    made = np.stack([rows.tokens for rows in steps]).reshape(4, 6, -1)

    assert made.shape[-1] == cfg.row_len == 32 + n
    epochs = [sorted(row.tobytes() for row in epoch) for epoch in made]
    assert epochs[0] == epochs[1] == epochs[2] == epochs[3]
    assert len({epoch.tobytes() for epoch in made}) > 1
    of_seed = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, n_future_tokens=4),
        data=dataclasses.replace(cfg.data, seed=3),
    )
    batches = train_batches(of_seed, np.arange(2), 0)
    first = np.concatenate([next(batches)["tokens"] for _ in range(3)])
    assert sorted(row[: 32 + n].tobytes() for row in first) == epochs[0]
    again = scaling.again_and_again(cfg, 4, seed=3)(np.random.default_rng(0))
    assert (again.tokens == steps[0].tokens).all()


@pytest.mark.slow
def test_models_of_several_epochs_are_measured(corpus_dir, tmp_path):
    of = trial(tmp_path, "e=4, n=4", steps=4, data=(str(corpus_dir),))
    figures = scaling.measure(of)

    assert 6 < figures["bits_per_byte"] < 10 and 1 <= figures["accepted"] <= 4
    assert figures["accepted_bytes"] == pytest.approx(figures["accepted"], rel=0.05)


def test_the_slope_over_epochs_is_that_of_least_squares():
    y = {1: 0.5, 4: 0.2, 16: 0.3}
    arms = {f"e={e}, n=4": {"bits_per_byte": x + 2.0} for e, x in y.items()}
    arms |= {f"e={e}, n=1": {"bits_per_byte": 2.0} for e in y}

    # Steps of equal length, ln 4: the slope is that from end to end.
    expected = (0.3 - 0.5) / np.log(16)
    assert scaling.slope_of_epochs(arms, 4) == pytest.approx(expected)


def of_chain(p_VV):
    """The law of each masked slot given the context and the slots that are seen.

    From the law of all blocks, by counting; log probabilities [B, S, V].
    """
    joint = diffusion.exact(p_VV)
    all_blocks = diffusion.blocks()

    @functools.cache
    def of_one(context, seen):
        fits = np.all(
            (np.array(seen) == diffusion.STATES) | (all_blocks == seen), axis=1
        )
        found = np.zeros((diffusion.SLOTS, diffusion.STATES))
        for slot in range(diffusion.SLOTS):
            for token in range(diffusion.STATES):
                here = fits & (all_blocks[:, slot] == token)
                found[slot, token] = joint[context, here].sum()
        return found / found.sum(axis=-1, keepdims=True)

    def log_laws(contexts, slots):
        rows = zip(contexts.tolist(), map(tuple, slots.tolist()), strict=True)
        with np.errstate(divide="ignore"):
            return np.log([of_one(*row) for row in rows])

    return log_laws


def test_blocks_of_exact_conditionals_are_exact_only_one_by_one():
    p_VV, _ = markov.chain(5)
    law = diffusion.exact(p_VV)
    np.testing.assert_allclose(law.sum(axis=1), 1.0)
    first = law.reshape(4, 4, -1).sum(axis=-1)
    np.testing.assert_allclose(first, p_VV)

    log_laws = of_chain(p_VV)
    off = {k: np.abs(diffusion.written(log_laws, k) - law).sum() for k in (1, 2, 4)}

    assert off[4] < 1e-9 and 0.1 < off[2] < off[1]
    np.testing.assert_allclose(diffusion.written(log_laws, 2).sum(axis=1), 1.0)


def test_a_sequence_goes_on_between_its_tokens():
    every = progressions.all_sequences()

    for offset in (1.0, 2.0, 5.0):
        at, whole = continuous.targets(every, offset, 3)
        assert whole.all() and at.tolist() == every[:, 3 + int(offset)].tolist()
    at, whole = continuous.targets(every, 1.5, 3)
    steps = (every[:, 1] - every[:, 0]) % 50
    assert whole.tolist() == (steps == 2).tolist()
    assert at[whole].tolist() == ((every[:, 3] + 3) % 50)[whole].tolist()
    assert not set(continuous.TRAINED) & {*continuous.BETWEEN, *continuous.BEYOND}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "arm"),
    [(diffusion, "two passes"), (continuous, "number and waves")],
)
def test_extensions_learn(tmp_path, study, arm):
    few, more = (study.measure(trial(tmp_path, arm, steps=n)) for n in (2, 200))

    if study is diffusion:
        assert more["variation"] < few["variation"] < 1
        assert abs(more["mass"] - 1) < 1e-4
    else:
        assert more["trained"] > few["trained"]
