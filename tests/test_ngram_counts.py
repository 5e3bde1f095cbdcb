"""Counts of runs of tokens and their ratios, against plain loops."""

import collections
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letter_counts import V, counted, dense_ratios, documents, ngrams

from mtp_jax.cli import count
from mtp_jax.data import ngram_counts
from mtp_jax.data.corpus import Corpus
from mtp_jax.decode.decoders.ngram_ratios import (
    log_joint_ratio,
    log_next_ratio,
    tables_of,
)
from mtp_jax.errors import UserError


@pytest.mark.parametrize("piece", [5, 64, 1 << 20])
def test_tables_hold_what_loops_count(monkeypatch, piece):
    monkeypatch.setattr(ngram_counts, "_CHUNK_TOKENS", piece)
    found, slow = ngrams(), counted(documents())
    runs = [((t,), int(c)) for t, c in enumerate(found.count_V) if c]
    assert dict(runs) == slow[1]
    rows = [(t,) for t in range(V)]
    for m, level in enumerate(found.levels, 2):
        rows = [
            (*rows[r], int(level.token_E[e]))
            for r in range(len(rows))
            for e in range(level.start_R[r], level.start_R[r + 1])
        ]
        assert dict(zip(rows, level.count_E.tolist(), strict=True)) == slow[m]


def test_from_python_a_corpus_is_counted_as_by_the_verb(corpus_dir, tmp_path):
    found = ngram_counts.count_corpus(corpus_dir, tmp_path / "python")
    count.main([f"--input={corpus_dir}", f"--output={tmp_path / 'verb'}"])

    kept = [ngram_counts.load(tmp_path / name, found.fingerprint) for name in
            ("python", "verb")]  # fmt: skip
    for other in kept:
        assert other.order == found.order == 3
        np.testing.assert_array_equal(other.count_V, found.count_V)
        for level, wanted in zip(other.levels, found.levels, strict=True):
            np.testing.assert_array_equal(level.token_E, wanted.token_E)
            np.testing.assert_array_equal(level.count_E, wanted.count_E)
    opened = ngram_counts.count_corpus(Corpus.open(corpus_dir), tmp_path / "p", order=2)
    np.testing.assert_array_equal(opened.count_V, found.count_V)
    assert opened.order == 2
    with pytest.raises(UserError, match="order is 4"):
        ngram_counts.count_corpus(corpus_dir, tmp_path / "no", order=4)
    assert not (tmp_path / "no").exists()


def test_the_verb_counts_the_train_split(corpus_dir, tmp_path, capsys):
    output = tmp_path / "counts.npz"
    assert count.main([f"--input={corpus_dir}", f"--output={output}", "--order=2"]) == 0
    corpus = Corpus.open(corpus_dir)
    ngrams = ngram_counts.load(output, corpus.tokenizer.fingerprint)
    docs = corpus.documents("train")
    assert ngrams.order == 2
    assert ngrams.count_V.sum() == docs.lengths.sum()
    pairs = collections.Counter()
    for i in range(len(docs)):
        row = docs.tokens(i).tolist()
        pairs.update(itertools.pairwise(row))
    level = ngrams.levels[0]
    first = np.repeat(np.arange(256), np.diff(level.start_R))
    keys = zip(first.tolist(), level.token_E.tolist(), strict=True)
    assert dict(zip(keys, level.count_E.tolist(), strict=True)) == pairs
    assert f"{int(docs.lengths.sum()):,} tokens" in capsys.readouterr().out


def test_a_file_that_does_not_fit_is_refused(counts_file, tmp_path):
    whole = pathlib.Path(counts_file).read_bytes()
    bad = tmp_path / "bad"
    with pytest.raises(UserError, match="another tokenizer"):
        ngram_counts.load(counts_file, "words")
    with pytest.raises(UserError, match="cannot be read"):
        ngram_counts.load(tmp_path / "nowhere", "letters")
    with pytest.raises(UserError, match="cannot be written"):
        ngram_counts.save(ngrams(2), tmp_path / "no" / "where")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (b"", b"PK", whole[: len(whole) // 2], bytes(flipped)):
        bad.write_bytes(content)
        with pytest.raises(UserError, match="not a file of counts, or damaged"):
            ngram_counts.load(bad, "letters")


@pytest.mark.parametrize(
    "change",
    [
        {"2_token_E": lambda x: x + V},
        {"2_start_R": lambda x: x[:-1]},
        {"2_start_R": lambda x: x[::-1]},
        {"1": lambda x: x[:-1]},
        {"3_count_E": lambda x: x.astype(np.float32)},
        {"format": lambda x: x + 1},
        {"2_count_E": lambda x: None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arrays_that_would_lead_a_look_up_astray_are_refused(
    counts_file, tmp_path, change
):
    arrays = dict(np.load(counts_file))
    [(name, changed)] = change.items()
    arrays[name] = changed(arrays[name])
    arrays = {name: x for name, x in arrays.items() if x is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match="not a file of counts"):
        ngram_counts.load(tmp_path / "bad.npz", "letters")


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("m", [2, 3, 4])
def test_ratios_are_those_of_the_counts(order, m):
    rng = np.random.default_rng(m)
    ids = [rng.permutation(V)[:6] for _ in range(m)]
    found = log_joint_ratio(
        jax.tree.map(jnp.asarray, tables_of(ngrams(order), V + 2)),
        [jnp.asarray(x) for x in ids],
    )
    pair, after = dense_ratios(order)
    for cell in itertools.product(range(6), repeat=m):
        x = [ids[i][r] for i, r in enumerate(cell)]
        slow = pair[x[0], x[1]]
        slow += sum(after[tuple(x[i - 2 : i + 1])] for i in range(2, m))
        np.testing.assert_allclose(found[cell], slow, rtol=2e-5, atol=2e-5)
    assert np.isneginf(found).any() and np.isfinite(found).any()


def test_the_next_token_backs_off_to_shorter_runs():
    tables = jax.tree.map(jnp.asarray, tables_of(ngrams(), V))
    pair, after = dense_ratios(3)
    single = counted(documents())[1]
    every = jnp.arange(V)
    before_X, last_X = (x.reshape(-1) for x in jnp.meshgrid(every, every))
    found_XV = jax.jit(jax.vmap(log_next_ratio, in_axes=(None, 0, 0, None)))(
        tables, before_X, last_X, every
    )
    seen = set()
    for found_V, before, last in zip(found_XV, before_X, last_X, strict=True):
        slow_V, discounts = after[before, last], np.zeros(V)
        for shorter_V in (pair[last], np.zeros(V)):
            unseen_V = np.isneginf(slow_V)
            discounts += unseen_V
            slow_V = np.where(unseen_V, shorter_V, slow_V)
        seen |= set(discounts)
        slow_V = slow_V + discounts * np.log(0.4)
        counted_V = [(x,) in single for x in range(V)]
        np.testing.assert_allclose(
            found_V[np.array(counted_V)], slow_V[counted_V], rtol=2e-5, atol=2e-5
        )
    assert seen == {0, 1, 2}
