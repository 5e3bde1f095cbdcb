"""Documents in blocks, against the definition written with loops and whole numbers."""

import itertools
import json
import pickle
import random

import numpy as np
import pytest
from corpora import (
    N,
    S,
    T,
    assert_equal_batches,
    contents,
    make_corpus,
    row_by_hand,
    run,
    stream_by_hand,
)

from mtp_jax.config import freeze
from mtp_jax.data import batches, order, packing
from mtp_jax.data import corpus as corpora
from mtp_jax.data import prepare as library
from mtp_jax.data.corpus import Corpus, Documents
from mtp_jax.errors import UserError

B = 4
BLOCK = 3
OPTIONS = {"heldout": 0.2, "shard_tokens": 150}


def texts():
    rng = random.Random(7)
    return ["".join(rng.choices("abcdefgh", k=rng.randint(1, 60))) for _ in range(60)]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A corpus of several shards whose last blocks are not full."""
    folder = tmp_path_factory.mktemp("blocks")
    made = make_corpus(folder / "b", texts(), block_documents=BLOCK, **OPTIONS)
    sizes = [
        s["documents"] for s in Corpus.open(made).manifest["splits"]["train"]["shards"]
    ]
    assert len(sizes) > 5 and any(n > BLOCK and n % BLOCK for n in sizes)
    return made


def split_mix(key, number):
    """The number-th output, from 0, of SplitMix64 that starts at `key`."""
    z = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def order_by_hand(shard_sizes, block, seed):
    """Numbers of all documents, in the order of an epoch."""
    sequence = np.random.SeedSequence([*seed, 2])
    of_shards, of_blocks, of_documents = map(int, sequence.generate_state(3, "u8"))
    found = []
    for shard in sorted(range(len(shard_sizes)), key=lambda i: split_mix(of_shards, i)):
        first = sum(shard_sizes[:shard])
        end = first + shard_sizes[shard]
        begins = range(first, end, block)
        for begin in sorted(begins, key=lambda i: split_mix(of_blocks, i)):
            which = (begin - first) // block % 64
            places = sorted(
                range(block), key=lambda i: split_mix(of_documents, which * block + i)
            )
            found += [begin + place for place in places if begin + place < end]
    return found


def by_hand(source, block, seed):
    entry = Corpus.open(source).manifest["splits"]["train"]
    return order_by_hand([s["documents"] for s in entry["shards"]], block, seed)


def make_config(sources, **fields):
    of_model = {"n_future_tokens": N, "num_layers": 4}
    of_data = {"sources": tuple(sources), "seq_len": T, "batch_size": B, **fields}
    return freeze({"model": of_model, "data": of_data})


def take(cfg, n, start=0, rows=None):
    rows = np.arange(B) if rows is None else rows
    return list(itertools.islice(batches.train_batches(cfg, rows, start), n))


def test_random_numbers_are_those_of_split_mix():
    # The first outputs from the state 1234567, as other implementations give them.
    assert [split_mix(1234567, i) for i in range(2)] == [
        6457827717110365317,
        3203168211198807973,
    ]


@pytest.mark.parametrize("seed", [(0, 0), (3, 1)])
@pytest.mark.parametrize("block", [1, 2, BLOCK, 1000])
def test_rows_are_cut_of_shards_blocks_and_documents_in_their_orders(
    blocks, block, seed
):
    documents = Corpus.open(blocks).documents("train")
    documents.block = block
    rows = packing.PackedRows(documents, S, T, 256, seed)
    expected = by_hand(blocks, block, seed)

    stream = stream_by_hand(documents, expected)

    assert sorted(expected) == list(range(len(documents)))
    assert len(rows) == -(-(len(stream) - 1) // T)
    for r in range(len(rows)):
        for key, values in rows[r].items():
            assert values.tolist() == row_by_hand(stream, r * T)[key], (r, key)


def test_any_part_of_the_stream_is_found(blocks):
    documents = Corpus.open(blocks).documents("train")
    made = order.BlockOrder(documents, BLOCK, (0, 0))
    expected = [
        (number, at)
        for number in by_hand(blocks, BLOCK, (0, 0))
        for at in range(documents.lengths[number])
    ]

    assert made.n_tokens == len(expected)
    for start in range(len(expected)):
        stop = min(start + 1 + start % 97, len(expected))
        pieces = made.pieces(start, stop)
        found = [(i, at) for i, begin, end in pieces for at in range(begin, end)]
        assert found == expected[start:stop]


def test_an_epoch_has_each_document_once_and_seeds_differ(blocks):
    documents = Corpus.open(blocks).documents("train")
    for seed in range(3):
        cfg = make_config([blocks], seed=seed)
        stream = stream_by_hand(documents, by_hand(blocks, BLOCK, (seed, 0)))
        n_rows = -(-(len(stream) - 1) // T)
        wanted = sorted(
            tuple(row_by_hand(stream, r * T)["tokens"]) for r in range(n_rows)
        )

        taken = take(cfg, -(-2 * n_rows // B))

        rows = [tuple(row) for batch in taken for row in batch["tokens"].tolist()]
        assert sorted(rows[:n_rows]) == sorted(rows[n_rows : 2 * n_rows]) == wanted
        assert rows[:n_rows] != rows[n_rows : 2 * n_rows]
    orders = [tuple(by_hand(blocks, BLOCK, (seed, 0))) for seed in range(3)]
    assert len(set(orders)) == 3


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 1, 13, 57, 10**9])
def test_hosts_together_have_the_batches_of_one_from_any_step(blocks, hosts, start):
    cfg = make_config([blocks, blocks], weights=(0.6, 0.4))
    whole = take(cfg, 3, start)
    before = take(cfg, 3 + min(start, 5), start - min(start, 5))

    parts = [take(cfg, 3, start, rows=np.arange(h, B, hosts)) for h in range(hosts)]

    assert_equal_batches(before[-3:], whole)
    for step, expected in enumerate(whole):
        for h in range(hosts):
            mine = {key: value[h::hosts] for key, value in expected.items()}
            assert_equal_batches([parts[h][step]], [mine])


def test_reader_processes_do_not_change_the_batches(blocks):
    alone, helped = (make_config([blocks], workers=w) for w in (0, 1))

    assert_equal_batches(take(helped, 4, start=5), take(alone, 4, start=5))


def test_heldout_rows_are_the_stored_ones(blocks, tmp_path):
    plain = make_corpus(tmp_path / "p", texts(), **OPTIONS)

    found, expected = (
        list(batches.heldout_batches(make_config([c]))) for c in (blocks, plain)
    )

    assert Corpus.open(blocks).documents("heldout").block == BLOCK
    assert_equal_batches(found, expected)


def test_the_start_reads_no_documents_and_a_row_only_its_own(blocks, monkeypatch):
    read = []
    monkeypatch.setattr(Documents, "lengths", None)
    for name in ("offsets", "every_offset"):
        plain = getattr(Documents, name)

        def noted(self, shard, *more, plain=plain):
            read.append(shard)
            return plain(self, shard, *more)

        monkeypatch.setattr(Documents, name, noted)
    documents = Corpus.open(blocks).documents("train")

    rows = packing.PackedRows(documents, S, T, 256, (0, 0))
    assert len(rows) > 20 and not read
    pieces = rows.pieces(11)

    numbers = [piece[0] for piece in pieces]
    there = documents.first.searchsorted(numbers, side="right") - 1
    assert set(read) == set(there.tolist())
    assert len(pickle.dumps(rows)) < 3000


def test_samples_of_a_split_take_its_first_shards_alone(blocks, monkeypatch):
    documents = Corpus.open(blocks).documents("train")
    sizes = np.diff(documents.first).tolist()

    def sampled(most):
        monkeypatch.setattr(corpora, "_SAMPLED", most)
        return documents.sampled_lengths.tolist()

    whole = documents.lengths.tolist()
    assert whole == [len(documents.tokens(i)) for i in range(len(documents))]
    assert sampled(len(whole)) == whole
    assert sampled(sizes[0] + 1) == whole[: sum(sizes[:2])]
    assert sampled(sizes[0]) == sampled(1) == whole[: sizes[0]]
    documents.block = None
    assert sampled(1) == whole
    none = Documents(documents.directory, [], np.dtype("u1"), BLOCK)
    assert none.sampled_lengths.tolist() == none.lengths.tolist() == []


def test_few_files_are_open_at_once_and_rows_stay_equal(blocks, monkeypatch):
    def rows():
        documents = Corpus.open(blocks).documents("train")
        made = packing.PackedRows(documents, S, T, 256, (0, 0))
        return documents, [made[r] for r in range(len(made))]

    _, expected = rows()
    monkeypatch.setattr(corpora, "_MOST_OPEN", 2)
    documents, found = rows()

    assert_equal_batches(found, expected)
    assert len(documents._open) == 2


def test_blocks_are_in_the_manifest_alone_which_older_versions_refuse(blocks, tmp_path):
    plain = make_corpus(tmp_path / "p", texts(), **OPTIONS)

    old, new = (Corpus.open(source) for source in (plain, blocks))

    assert (old.manifest["format"], new.manifest["format"]) == (1, 2)
    assert old.fingerprint != new.fingerprint
    for entry in new.manifest["splits"].values():
        assert entry.pop("block_documents") == BLOCK
    assert {**new.manifest, "format": 1} == old.manifest
    files = [contents(source.directory) for source in (old, new)]
    assert all(
        files[0].pop("manifest.json") != x.pop("manifest.json") for x in files[1:]
    )
    assert files[0] == files[1]


def test_large_splits_are_in_blocks_unless_told_otherwise(tmp_path, monkeypatch):
    source = tmp_path / "src.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts()))
    monkeypatch.setattr(library, "MOST_IN_ONE_ORDER", 20)

    def blocks_of(name, *options):
        made = run(source, tmp_path / name, "--heldout=0.2", *options)
        splits = made.manifest["splits"]
        return [splits[s].get("block_documents") for s in ("train", "heldout")]

    assert blocks_of("default") == [256, None]
    assert blocks_of("none", "--block_documents=0") == [None, None]
    assert blocks_of("some", "--block_documents=7") == [7, 7]
    with pytest.raises(UserError, match="block_documents is -1; give 0 or more"):
        library.prepare(source, tmp_path / "bad", block_documents=-1)
    with pytest.raises(UserError, match="-3' is not a whole number from 0 on"):
        run(source, tmp_path / "bad", "--block_documents=-3")


def test_a_corpus_of_one_order_keeps_it():
    assert order.document_order(12, (0, 0)).tolist() == [
        *(0, 8, 9, 3, 7, 5, 1, 11, 2, 10, 6, 4)
    ]


@pytest.mark.parametrize("value", ["0", "-1", "true", "1.5", '"3"', "null"])
def test_a_size_of_blocks_that_cannot_be_is_refused(blocks, tmp_path, value):
    for path in Corpus.open(blocks).directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text().replace(
        f'"block_documents": {BLOCK}', f'"block_documents": {value}'
    )
    manifest.write_text(text)

    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Corpus.open(tmp_path)


def test_offsets_that_do_not_fit_the_manifest_are_refused(blocks, tmp_path):
    for path in Corpus.open(blocks).directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "train-00001.offsets"
    offsets = np.fromfile(path, "<u8")
    offsets[-1] += 1
    offsets.tofile(path)
    rows = packing.PackedRows(Corpus.open(tmp_path).documents("train"), S, T, 256, None)

    with pytest.raises(UserError, match="shard 1: its offsets end at"):
        [rows[r] for r in range(len(rows))]
