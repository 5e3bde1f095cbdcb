"""Sources whose laws are known after any text, by enumeration, and their studies.

`self_generation` has a hidden Markov chain, `hierarchical` words and sentences.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.studies import hierarchical, progressions, self_generation
from mtp_jax.studies.hierarchical import IN_SENTENCE, LENGTH, SPACE, STOP, TOPICS
from mtp_jax.studies.study import Trial


def trial(tmp_path, arm, size="tiny", **changed):
    return Trial(
        arm=arm, seed=0, size=size, folder=tmp_path, shared=tmp_path, **changed
    )


def probability(tokens):
    """The probability of a text, summed over all paths of hidden states."""
    first, step, said = self_generation.source()
    total = 0.0
    for path in itertools.product(range(self_generation.STATES), repeat=len(tokens)):
        p = first[path[0]]
        for a, b in itertools.pairwise(path):
            p *= step[a, b]
        total += p * np.prod([said[h, x] for h, x in zip(path, tokens, strict=True)])
    return total


def test_the_law_of_a_hidden_chain_is_that_of_all_paths():
    rows = np.random.default_rng(0).integers(0, self_generation.TOKENS, (6, 3))

    found = self_generation.laws(rows)

    np.testing.assert_allclose(found.sum(axis=-1), 1.0)
    for row, law_TV in zip(rows.tolist(), found, strict=True):
        for t in (0, 2):
            seen = row[: t + 1]
            expected = [probability([*seen, x]) for x in range(self_generation.TOKENS)]
            np.testing.assert_allclose(law_TV[t], expected / probability(seen))


def test_text_of_a_hidden_chain_has_its_law():
    """A hundred thousand texts; every triple is as frequent as it should be."""
    rows = self_generation.text(np.random.default_rng(0), 100_000, 3)

    first, step, said = self_generation.source()
    law = np.einsum("a,ai,ab,bj,bc,ck->ijk", first, said, step, said, step, said)
    assert law.sum() == pytest.approx(1.0)
    counts = np.zeros_like(law)
    np.add.at(counts, tuple(rows.T), 1)
    off = (counts - 1e5 * law) / np.sqrt(1e5 * law * (1 - law))
    assert np.abs(off[law > 1e-4]).max() < 5 and abs(np.mean(off**2) - 1) < 0.2


def test_a_model_that_is_the_source_has_no_gap(tmp_path, monkeypatch):
    """Its own text is then the source's, and every figure is 0."""

    class Outputs:
        def __init__(self, tokens):
            self.logits_NBTV = np.log(self_generation.laws(tokens))[None] + 3.0

    monkeypatch.setattr(self_generation, "fit", lambda *of: None)
    monkeypatch.setattr(self_generation, "head_outputs", lambda _, x: Outputs(x))

    figures = self_generation.measure(trial(tmp_path, "n=1"))

    for name in ("forced", "free", "exposure", "growing", "text"):
        assert abs(figures[name]) < 1e-9


def test_a_model_that_is_lost_after_its_own_text_has_a_gap(tmp_path, monkeypatch):
    """It often writes a pair of tokens that is rare, and then repeats itself."""
    first, step, said = self_generation.source()
    for _ in range(100):
        first = first @ step
    pairs = np.einsum("a,ai,ab,bj->ij", first, said, step, said)
    a = np.argmax(pairs.sum(axis=1))
    b = np.argmin(pairs[a])

    class Outputs:
        def __init__(self, tokens):
            law = self_generation.laws(tokens)
            law[tokens == a, b] += 1.0
            here = (tokens[:, :-1] == a) & (tokens[:, 1:] == b)
            lost = np.pad(np.maximum.accumulate(here, axis=1), ((0, 0), (1, 0)))
            law[lost] = np.where(np.arange(law.shape[-1]) == a, 1.0, 1e-3)
            self.logits_NBTV = np.log(law)[None]

    monkeypatch.setattr(self_generation, "fit", lambda *of: None)
    monkeypatch.setattr(self_generation, "head_outputs", lambda _, x: Outputs(x))
    figures = self_generation.measure(trial(tmp_path, "n=1", "quick"))

    assert figures["exposure"] > 0.1 and figures["growing"] > 0.1
    assert figures["share"] == pytest.approx(figures["free"] / figures["forced"] - 1)


def test_texts_are_written_by_the_law_of_what_is_there():
    """A law that depends on the token before; one draw for each token."""
    law = np.random.default_rng(1).dirichlet(np.ones(self_generation.TOKENS), 12)
    u = np.random.default_rng(2).random((4000, 5))
    first = np.zeros((4000, 1), np.int64)

    rows = self_generation.written(lambda tokens: law[tokens], first, u)

    assert (rows[:, 0] == 0).all()
    shares = np.bincount(rows[:, 1], minlength=12) / 4000
    np.testing.assert_allclose(shares, law[0], atol=0.03)
    for a, b, x in zip(rows[:, 3], rows[:, 4], u[:, 4], strict=True):
        below = law[a][:b].sum()
        assert below - 1e-9 <= x <= below + law[a][b] + 1e-9


def test_heads_leave_the_way_of_head_1_as_deep(tmp_path):
    for size in ("tiny", "quick", "full"):
        models = {
            arm: self_generation.config_of(trial(tmp_path, arm, size)).model
            for arm in self_generation.STUDY.arms(size)
        }
        assert models["n=1"].num_layers == models["n=4"].num_layers - 3 == 3
        assert models["n=1, deeper"].num_layers == models["n=4"].num_layers


@pytest.mark.slow
def test_a_model_writes_and_is_measured(tmp_path):
    figures = self_generation.measure(trial(tmp_path, "n=4"))

    assert figures["forced"] > 0 and figures["free"] > 0
    assert len(figures["free_by_position"]) == self_generation.LENGTH
    assert figures == self_generation.measure(trial(tmp_path, "n=4"))


def likelihood(letters):
    """The probability of the first letters of a text, by recursion over its topics."""
    words, of_topic, next_topic = hierarchical.language()

    @functools.cache
    def rest(topic, number, at):
        """The probability of what is left from `at` on, where a word begins."""
        last = number % IN_SENTENCE == IN_SENTENCE - 1
        total, left = 0.0, letters[at:]
        if not left:
            return 1.0
        for word, spelt in enumerate(words):
            whole = (*spelt, STOP if last else SPACE)
            if left[: len(whole)] != whole[: len(left)]:
                continue
            p = of_topic[topic, word]
            if len(left) <= len(whole):
                total += p
            elif not last:
                total += p * rest(topic, number + 1, at + len(whole))
            else:
                total += p * sum(
                    next_topic[topic, k] * rest(k, number + 1, at + len(whole))
                    for k in range(TOPICS)
                )
        return total

    return sum(rest(topic, 0, 0) for topic in range(TOPICS)) / TOPICS


def test_the_law_of_the_next_letter_is_that_of_all_topics():
    rows = hierarchical.text(np.random.default_rng(3), 3)["letter"][:, :40]

    for row in rows:
        found = hierarchical.laws(row)["letter"]
        for t in (0, 5, 17, 39):
            seen = tuple(row[: t + 1].tolist())
            expected = [likelihood((*seen, c)) for c in range(hierarchical.CHARACTERS)]
            np.testing.assert_allclose(found[t], expected / likelihood(seen))


def test_laws_of_words_are_those_of_what_is_asked():
    """Over many texts what is asked has on average the law that is said to be its."""
    made = hierarchical.text(np.random.default_rng(4), 150)
    names = ("word", "next word", "next sentence")
    scores = {name: [] for name in names}
    for row in range(150):
        laws = hierarchical.laws(made["letter"][row, :-1])
        for name in names:
            p = laws[name][np.arange(LENGTH), made[name][row]]
            assert (p > 0).all()
            # The mean of -log p is the entropy, if p is the law.
            entropy = -np.sum(
                laws[name] * np.log(np.where(laws[name] > 0, laws[name], 1)), axis=-1
            )
            scores[name].append(np.mean(-np.log(p) - entropy))
    for name in names:
        mean, error = np.mean(scores[name]), np.std(scores[name]) / np.sqrt(150)
        assert abs(mean) < 4 * error < 0.2, name


def assert_labels(made):
    words, _, _ = hierarchical.language()
    spelt = ["".join("abcdefgh"[x] for x in word) for word in words]
    for row in range(len(made["letter"])):
        letters = "".join("abcdefgh ."[x] for x in made["letter"][row])
        for sentence in letters.split(".")[:-1]:
            assert len(sentence.split(" ")) == IN_SENTENCE
            assert set(sentence.split(" ")) <= set(spelt)
        assert letters[2:] == "".join(
            "abcdefgh ."[x] for x in made["letter 2"][row][:-1]
        )
        assert letters[3:] == "".join(
            "abcdefgh ."[x] for x in made["letter 3"][row][:-2]
        )
        for t in range(LENGTH):
            # The word of the letter at t + 1, and how many words ended before it.
            before = letters[: t + 1]
            begun = before.replace(".", " ").rpartition(" ")[2]
            after = letters[t + 1 :].replace(".", " ").partition(" ")
            if after[1]:
                assert begun + after[0] == spelt[made["word"][row, t]]
            then = after[2].replace(".", " ").partition(" ")
            if then[1]:
                assert then[0] == spelt[made["next word"][row, t]]
            following = letters[t + 1 :].partition(".")[2]
            first = following.replace(".", " ").partition(" ")
            if first[1]:
                assert first[0] == spelt[made["next sentence"][row, t]]


def test_what_is_asked_is_what_the_text_goes_on_with():
    assert_labels(hierarchical.text(np.random.default_rng(0), 60))


@pytest.mark.slow
def test_what_is_asked_is_what_many_texts_go_on_with():
    assert_labels(hierarchical.text(np.random.default_rng(1), 100_000 // LENGTH + 1))


def test_topics_and_words_are_as_frequent_as_they_should():
    words, of_topic, next_topic = hierarchical.language()
    made = hierarchical.text(np.random.default_rng(5), 4000)

    first = np.bincount(made["word"][:, 0], minlength=len(words)) / 4000
    np.testing.assert_allclose(first, of_topic.mean(axis=0), atol=0.03)
    then = np.bincount(made["next sentence"][:, 0], minlength=len(words)) / 4000
    expected = next_topic.mean(axis=0) @ of_topic
    np.testing.assert_allclose(then, expected, atol=0.03)


def test_heads_that_say_the_law_have_no_gap(tmp_path, monkeypatch):
    def said(params, letters_RT):
        arm = hierarchical._ARMS["words"]
        found = np.full((3, *letters_RT.shape, progressions.VOCABULARY), -1e9)
        for row, letters in enumerate(np.asarray(letters_RT)):
            laws = hierarchical.laws(letters)
            for number, name in enumerate(("letter", *arm)):
                with np.errstate(divide="ignore"):
                    log_p = np.maximum(np.log(laws[name]), -1e9)
                found[number, row, :, : log_p.shape[-1]] = log_p
        return found + np.log([0.5, 1.0, 1.0])[:, None, None, None]

    monkeypatch.setattr(hierarchical.progressions, "log_probabilities", said)
    monkeypatch.setattr(hierarchical, "train", lambda *of: None)

    figures = hierarchical.measure(trial(tmp_path, "words"))

    assert list(figures) == ["gap, letter", "gap, word", "gap, next word"]
    assert figures["gap, letter"] == pytest.approx(np.log(2))
    assert abs(figures["gap, word"]) < 1e-9 and abs(figures["gap, next word"]) < 1e-9


@pytest.mark.slow
def test_heads_over_words_learn(tmp_path):
    few, more = (
        hierarchical.measure(trial(tmp_path, "words and sentences", steps=n))
        for n in (2, 150)
    )

    for name in ("gap, letter", "gap, word", "gap, next sentence"):
        assert 0 < more[name] < few[name]
    key, letters = jax.random.key(0), jnp.zeros((4, LENGTH), jnp.int32)
    params = hierarchical.train(key, letters, letters[None], 1)
    assert params["w_heads"].shape[0] == 1
