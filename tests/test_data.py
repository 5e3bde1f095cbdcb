"""Batches, against the definition written with loops."""

import dataclasses
import hashlib
import itertools
import pathlib
import random

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
from runs import ROOT

from mtp_jax.config import freeze
from mtp_jax.data import batches, packing
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.order import document_order
from mtp_jax.data.prepare import prepare
from mtp_jax.errors import UserError

TEXTS = [
    pathlib.Path(__file__).parent / "data" / "verses.txt",
    *(ROOT.parent / "shared" / "data" / "tinyshakespeare").glob("input.txt"),
]
B = 4


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A second source, of digits alone."""
    texts = [str(i) * 20 for i in range(40)]
    folder = tmp_path_factory.mktemp("digits") / "d"
    return make_corpus(folder, texts, heldout=0.2)


@pytest.fixture
def cfg(story):
    return make_config([story])


def make_config(sources, **fields):
    of_model = {"n_future_tokens": N, "num_layers": 4}
    of_data = {"sources": tuple(sources), "seq_len": T, "batch_size": B, **fields}
    return freeze({"model": of_model, "data": of_data})


def take(cfg, n, start=0, rows=None):
    rows = np.arange(cfg.data.batch_size) if rows is None else rows
    return list(itertools.islice(batches.train_batches(cfg, rows, start), n))


def test_each_document_is_in_an_epoch_exactly_once_and_epochs_differ(cfg, story):
    documents = Corpus.open(story).documents("train")
    order = document_order(len(documents), (cfg.data.seed, 0))
    stream = stream_by_hand(documents, order)
    n_rows = -(-(len(stream) - 1) // T)
    expected = sorted(
        tuple(row_by_hand(stream, r * T)["tokens"]) for r in range(n_rows)
    )

    batches = take(cfg, 3 * n_rows // B + 1)
    rows = [tuple(row) for batch in batches for row in batch["tokens"].tolist()]

    epochs = [rows[i * n_rows : (i + 1) * n_rows] for i in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[1] != epochs[2]
    by_document = [stream_by_hand(documents, [i]) for i in range(len(documents))]
    assert sorted(t for t, _ in stream) == sorted(t for d in by_document for t, _ in d)


def rows_of(cfg, n_rows):
    batches = take(cfg, -(-n_rows // B))
    return [tuple(row) for batch in batches for row in batch["tokens"].tolist()]


def test_the_seed_changes_the_order_of_documents_and_of_rows(story, tmp_path):
    n_rows = len(
        packing.PackedRows(Corpus.open(story).documents("train"), S, T, 256, None)
    )
    found = [rows_of(make_config([story], seed=s), n_rows)[:n_rows] for s in (0, 0, 1)]
    assert found[0] == found[1]
    assert sorted(found[0]) != sorted(found[2])  # other documents beside each other

    text = "".join(random.Random(0).choices("abcdef", k=20 * T))
    single = make_corpus(tmp_path / "single", [text], heldout=0)
    found = [rows_of(make_config([single], seed=s), 20)[:20] for s in (0, 1)]
    assert found[0] != found[1]


@pytest.mark.parametrize("start", [1, 7, 30, 41])
def test_batches_from_any_step_equal_the_uninterrupted_ones(cfg, story, digits, start):
    mixed = make_config([story, digits], weights=(0.7, 0.3))
    for run in (cfg, mixed):
        whole = take(run, 50)
        assert_equal_batches(take(run, 50 - start, start), whole[start:])


def test_steps_far_away_can_be_reached(cfg):
    far = 10**12

    assert_equal_batches(take(cfg, 1, far + 1), take(cfg, 2, far)[1:])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_have_the_batch_and_the_hash_of_one(cfg, hosts):
    whole = take(cfg, 5)

    parts = [take(cfg, 5, rows=np.arange(h, B, hosts)) for h in range(hosts)]

    for step, expected in enumerate(whole):
        joined = {key: np.empty_like(value) for key, value in expected.items()}
        sums = np.zeros(2, np.uint32)
        for h in reversed(range(hosts)):
            for key, value in parts[h][step].items():
                joined[key][h::hosts] = value
            sums = sums + packing.batch_hash(parts[h][step]["hash"])
        assert_equal_batches([joined], [expected])
        expected_hash = packing.batch_hash(expected["hash"])
        assert packing.format_hash(sums) == packing.format_hash(expected_hash)


@pytest.mark.parametrize("workers", [1, 2])
def test_reader_processes_do_not_change_the_batches(story, digits, workers):
    fields = {"weights": (0.5, 0.5)}
    alone = make_config([story, digits], **fields)
    helped = make_config([story, digits], workers=workers, **fields)

    assert_equal_batches(take(helped, 6, start=5), take(alone, 6, start=5))


def test_the_hash_is_that_of_the_bytes_of_each_row(cfg):
    batch = take(cfg, 1, start=2)[0]

    total = 0
    for r in range(B):
        parts = [batch["tokens"][r], batch["segments"][r]]
        content = b"".join(part.astype("<i4").tobytes() for part in parts)
        content += r.to_bytes(8, "little")
        digest = hashlib.blake2b(content, digest_size=8).digest()
        assert batch["hash"][r].astype("<u4").tobytes() == digest
        low, high = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
        total += (high << 32) | low
        sums = packing.batch_hash(batch["hash"][: r + 1])
        assert int(packing.format_hash(sums)[8:], 16) == total % 2**32


def test_the_hash_sees_tokens_segments_and_the_place_of_rows(cfg):
    row = {key: value[0] for key, value in take(cfg, 1)[0].items()}
    seen = {packing.row_hash(row, 0).tobytes(), packing.row_hash(row, 1).tobytes()}
    for key in ("tokens", "segments"):
        changed = {**row, key: row[key].copy()}
        changed[key][-1] ^= 1
        seen.add(packing.row_hash(changed, 0).tobytes())

    assert len(seen) == 4
    assert packing.format_hash(np.array([1, 0xABC], np.uint32)) == "00000abc00000001"


def test_sources_are_mixed_by_their_weights(story, digits):
    mixed = make_config([story, digits], weights=(3.0, 1.0))

    rows = np.concatenate([batch["tokens"] for batch in take(mixed, 50)])

    letters = (rows >= ord("a")) & (rows <= ord("z"))
    assert letters.any(axis=1).sum() == pytest.approx(0.75 * len(rows), abs=2)


def test_a_source_given_twice_comes_in_two_orders_of_documents(story):
    documents = Corpus.open(story).documents("train")
    n_rows = len(packing.PackedRows(documents, S, T, 256, None))

    rows = rows_of(make_config([story, story]), 2 * n_rows)

    first, second = rows[0 : 2 * n_rows : 2], rows[1 : 2 * n_rows : 2]
    assert sorted(first) != sorted(second)


def test_heldout_batches_cover_the_split_once_in_order(cfg, story, digits):
    run = make_config([story, digits])
    expected = []
    for source in (story, digits):
        documents = Corpus.open(source).documents("heldout")
        stream = stream_by_hand(documents, range(len(documents)))
        expected += [
            row_by_hand(stream, start) for start in range(0, len(stream) - 1, T)
        ]

    made = list(batches.heldout_batches(run))

    n_padding = -len(expected) % B
    expected += [dict.fromkeys(expected[0], [0] * S)] * n_padding
    assert n_padding > 0
    assert len(made) * B == len(expected)
    for key in expected[0]:
        found = np.concatenate([batch[key] for batch in made])
        assert found.tolist() == [row[key] for row in expected]
    assert_equal_batches(list(batches.heldout_batches(run)), made)


def test_heldout_batches_can_be_limited_and_shared_by_hosts(cfg):
    everything = list(batches.heldout_batches(cfg))
    known = [row for batch in everything for row in batch["tokens"].tolist()]

    limited = list(batches.heldout_batches(cfg, limit=2))
    shares = [
        list(
            batches.heldout_batches(cfg, rows_of_this_host=np.arange(h, B, 2), limit=2)
        )
        for h in range(2)
    ]

    assert len(everything) > 4
    assert_equal_batches(list(batches.heldout_batches(cfg, limit=999)), everything)
    places = [known.index(row) for b in limited for row in b["tokens"].tolist()]
    gaps = np.diff(places)
    assert len(places) == 2 * B and places[0] == 0
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    for step, batch in enumerate(limited):
        np.testing.assert_array_equal(batch["tokens"][1::2], shares[1][step]["tokens"])
        np.testing.assert_array_equal(batch["hash"][0::2], shares[0][step]["hash"])


def test_heldout_batches_of_other_corpora_and_of_none(cfg, digits, tmp_path):
    sources = batches.open_sources(cfg, [digits], splits=["heldout"])
    tokens = np.concatenate(
        [b["tokens"] for b in batches.heldout_batches(cfg, sources)]
    )
    assert not ((tokens >= ord("a")) & (tokens <= ord("z"))).any()

    bare = make_corpus(tmp_path / "bare", ["text " * 20], heldout=0)
    with pytest.raises(UserError, match=r"no held-out documents in .*bare"):
        batches.heldout_batches(make_config([bare]))


def test_a_vocabulary_larger_than_the_models_is_refused(cfg):
    model = dataclasses.replace(cfg.model, vocab_size=200)
    small = dataclasses.replace(cfg, model=model)

    with pytest.raises(UserError, match=r"256 ids, config\.model\.vocab_size is 200"):
        batches.open_sources(small)


def test_sources_of_different_tokenizers_are_refused(story, tmp_path):
    texts = [f"some text {i}" for i in range(50)]
    other = make_corpus(tmp_path / "other", texts, train_tokenizer=280)
    run = make_config([story, other])
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=280))

    with pytest.raises(
        UserError, match=r"other.* another tokenizer \(tokenizer.model\)"
    ):
        batches.open_sources(run)


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path):
    short = make_corpus(tmp_path / "short", ["a" * (S - 3)], heldout=0)
    with pytest.raises(UserError, match=f"{S - 1} tokens to train on, less than .*{S}"):
        batches.train_batches(make_config([short]), np.arange(B), 0)

    enough = make_corpus(tmp_path / "enough", ["a" * (S - 2)], heldout=0)
    assert take(make_config([enough]), 1)[0]["tokens"].shape == (B, S)


def test_damage_is_found_before_the_first_batch_unless_not_asked_for(tmp_path):
    corpus = make_corpus(tmp_path / "c", ["text " * 50], heldout=0)
    path = pathlib.Path(corpus) / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)

    with pytest.raises(UserError, match=r"train-00000\.tokens is damaged"):
        batches.train_batches(make_config([corpus]), np.arange(B), 0)
    take(make_config([corpus], verify=False), 1)
    with pytest.raises(UserError, match="not a prepared corpus"):
        batches.open_sources(make_config([str(tmp_path)]))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_outside_the_vocabulary_is_refused_by_document(story, workers):
    run = make_config([story], workers=workers)
    sources = batches.open_sources(run)
    small = dataclasses.replace(run.model, vocab_size=97)
    run = dataclasses.replace(run, model=small)

    with pytest.raises(
        UserError, match=r"corpus, document texts\.jsonl:\d+: id \d+ is"
    ):
        next(batches.train_batches(run, np.arange(B), 0, sources))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_real_text_comes_through_whole(tmp_path, path):
    prepare(path, tmp_path / "c", heldout=0)

    run = make_config([str(tmp_path / "c")], seq_len=1024)
    corpus = batches.open_sources(run)[0]
    rows = packing.PackedRows(corpus.documents("train"), 1024 + N, 1024, 256, None)
    tokens = np.concatenate([rows[r]["tokens"][:1024] for r in range(len(rows))])

    text = path.read_text()
    assert corpus.tokenizer.decode(tokens[: len(text.encode()) + 1]) == text
