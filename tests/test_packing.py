"""Rows of a split, against the definition written with loops."""

import itertools
import pickle

import numpy as np
import pytest
from corpora import (
    N,
    S,
    T,
    assert_equal_batches,
    make_corpus,
    row_by_hand,
    stream_by_hand,
)

from mtp_jax.data import packing
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.order import document_order


@pytest.mark.parametrize("seed", [None, (0, 0), (3, 1)])
def test_rows_are_the_concatenated_documents_cut_every_stride(story, seed):
    documents = Corpus.open(story).documents("train")
    rows = packing.PackedRows(documents, S, T, 256, seed)

    stream = stream_by_hand(documents, document_order(len(documents), seed))

    for r in range(len(rows)):
        expected = row_by_hand(stream, r * T)
        for key, values in rows[r].items():
            assert values.dtype == np.int32
            assert values.tolist() == expected[key], (r, key)


def test_the_order_of_documents_is_a_permutation_that_depends_on_the_seed():
    orders = [document_order(50, seed).tolist() for seed in ((0, 0), (1, 0))]

    assert document_order(50, None).tolist() == list(range(50))
    assert orders[0] == document_order(50, (0, 0)).tolist()
    assert orders[0] != orders[1] and orders[0] != list(range(50))
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize("length", [2, 3, S - 1, S, S + 1, T, T + 1, T + 2, 2 * T + 1])
def test_every_target_of_every_head_occurs_once_an_epoch(tmp_path, length):
    corpus = make_corpus(tmp_path / "c", ["a" * (length - 2) or "a"], heldout=0)
    documents = Corpus.open(corpus).documents("train")
    rows = packing.PackedRows(documents, S, T, 256, None)
    total = int(documents.lengths[0])

    seen = []
    for r in range(len(rows)):
        segments = rows[r]["segments"]
        seen += [
            (r * T + t, head)
            for t, head in itertools.product(range(T), range(1, N + 1))
            if segments[t] and segments[t] == segments[t + head]
        ]
        assert (segments[: T + 1] != 0).sum() > 1  # a row without a target is waste

    pairs = itertools.product(range(total), range(1, N + 1))
    assert sorted(seen) == [(p, h) for p, h in pairs if p + h < total]


def test_rows_pickle_small(story):
    rows = packing.PackedRows(Corpus.open(story).documents("train"), S, T, 256, (0, 0))
    expected = rows[5]

    again = pickle.loads(pickle.dumps(rows))

    assert len(pickle.dumps(rows)) < 5000
    assert_equal_batches([again[5]], [expected])
