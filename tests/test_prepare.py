"""The verb prepare, and the corpora that it makes."""

import contextlib
import gzip
import hashlib
import json
import pickle

import numpy as np
import pytest
from corpora import contents, run

from mtp_jax.cli import prepare
from mtp_jax.data import prepare as library
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.sentencepiece_tokenizer import train_sentencepiece
from mtp_jax.data.tokenizer import load_tokenizer
from mtp_jax.errors import UserError

BOS, EOS = 0xFE, 0xFF


def texts_of(corpus, split):
    """name -> text of a split."""
    documents = corpus.documents(split)
    return {
        documents.name(i): corpus.tokenizer.decode(documents.tokens(i))
        for i in range(len(documents))
    }


def all_texts(corpus):
    return texts_of(corpus, "train") | texts_of(corpus, "heldout")


def test_every_file_is_one_document_between_begin_and_end(source, tmp_path):
    corpus = run(source, tmp_path / "out")

    assert all_texts(corpus) == {
        f"src/{p.name}": p.read_text() for p in source.iterdir()
    }
    for split in ("train", "heldout"):
        documents = corpus.documents(split)
        found = [documents.tokens(i) for i in range(len(documents))]
        assert all(t[0] == BOS and t[-1] == EOS for t in found)
        assert documents.lengths.tolist() == [len(t) for t in found]
        entry = corpus.manifest["splits"][split]
        assert entry["documents"] == len(found)
        assert (
            entry["tokens"] == sum(map(len, found)) == entry["bytes"] + 2 * len(found)
        )


def test_the_files_are_flat_little_endian_arrays_with_their_sha256(source, tmp_path):
    corpus = run(source, tmp_path / "out")
    shard = corpus.manifest["splits"]["train"]["shards"][0]

    offsets = np.fromfile(tmp_path / "out" / "train-00000.offsets", "<u8")
    tokens = np.fromfile(tmp_path / "out" / "train-00000.tokens", "<u1")
    names = (tmp_path / "out" / "train-00000.names").read_text().splitlines()

    assert len(offsets) == len(names) + 1 == shard["documents"] + 1
    for i, name in enumerate(names):
        text = (source.parent / name).read_bytes()
        assert tokens[offsets[i] : offsets[i + 1]].tobytes() == b"\xfe" + text + b"\xff"
    for kind, recorded in shard["files"].items():
        data = (tmp_path / "out" / f"train-00000.{kind}").read_bytes()
        assert recorded["bytes"] == len(data)
        assert recorded["sha256"] == hashlib.sha256(data).hexdigest()


def test_from_python_the_corpus_is_that_of_the_verb(source, tmp_path):
    run(source, tmp_path / "verb", "--shard_tokens=300", "--exclude=f1*", "--heldout=0")

    manifest = library.prepare(
        [source], tmp_path / "python",
        shard_tokens=300, exclude=("f1*",), heldout=0, workers=1,
    )  # fmt: skip

    assert contents(tmp_path / "python") == contents(tmp_path / "verb")
    on_disk = json.loads((tmp_path / "python" / "manifest.json").read_text())
    assert manifest == on_disk == Corpus.open(tmp_path / "python").manifest
    assert manifest["splits"]["train"]["documents"] == 50


def test_progress_is_told_in_bytes_of_the_input(source, tmp_path):
    size = sum(path.stat().st_size for path in source.iterdir())
    begun, ended, read = [], [], []

    @contextlib.contextmanager
    def progress(title, size):
        begun.append((title, size))
        yield read.append
        ended.append(sum(read))

    options = {"train_tokenizer": 285, "workers": 1, "progress": progress}
    library.prepare(source, tmp_path / "out", **options)

    assert begun == [("training a tokenizer", size), ("preparing", size)]
    assert ended == [size, 2 * size]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heldout": 1}, "heldout is 1; give a share"),
        ({"heldout": float("nan")}, "heldout is nan; give a share"),
        ({"shard_tokens": 0}, "shard_tokens is 0; .*above 0"),
        ({"workers": 0}, "workers is 0; .*above 0"),
        ({"workers": 99999}, "workers is 99999; at most .* on this machine"),
        ({"tokenizer": "a.model", "train_tokenizer": 300}, "exclude each other"),
        ({"output": " "}, "output is empty"),
    ],
)
def test_bad_arguments_from_python_are_refused(source, tmp_path, options, match):
    before = set(tmp_path.iterdir())

    with pytest.raises(UserError, match=match):
        library.prepare(source, **{"output": tmp_path / "out", **options})

    assert set(tmp_path.iterdir()) == before


def test_shards_split_between_documents_only(source, tmp_path):
    whole = run(source, tmp_path / "whole")
    split = run(source, tmp_path / "split", "--shard_tokens=150")

    assert len(split.manifest["splits"]["train"]["shards"]) > 5
    assert all(
        shard["tokens"] <= 150 or shard["documents"] == 1
        for shard in split.manifest["splits"]["train"]["shards"]
    )
    assert texts_of(split, "train") == texts_of(whole, "train")
    assert list(texts_of(split, "train")) == list(texts_of(whole, "train"))
    np.testing.assert_array_equal(
        split.documents("train").lengths, whole.documents("train").lengths
    )


def test_the_number_of_workers_does_not_change_a_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_jax.data.tokenizing._TASK_PARTS", 7)
    monkeypatch.setattr("mtp_jax.data.documents._BLOCK_BYTES", 500)
    lines = "".join(json.dumps({"text": f"story {i} " * 5}) + "\n" for i in range(100))
    (source / "stories.jsonl").write_text(lines)

    options = ["--shard_tokens=900", "--train_tokenizer=300"]
    run(source, tmp_path / "one", *options)
    run(source, tmp_path / "three", *options, "--workers=3")

    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_lines_of_jsonl_are_documents_named_by_line(tmp_path):
    texts = ["first", "two\u2028lines\u2029 in\x85one", "é😀\x00", "crlf\r\n", "last"]
    lines = [json.dumps({"body": text}, ensure_ascii=False) for text in texts]
    lines.insert(2, "")
    (tmp_path / "d.jsonl").write_bytes("\n".join(lines).encode())

    corpus = run(
        tmp_path / "d.jsonl", tmp_path / "o", "--text_field=body", "--heldout=0"
    )

    numbers = [1, 2, 4, 5, 6]
    expected = {f"d.jsonl:{n}": text for n, text in zip(numbers, texts, strict=True)}
    assert all_texts(corpus) == expected


def test_small_blocks_of_lines_keep_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_jax.data.documents._BLOCK_BYTES", 40)
    lines = [json.dumps({"text": "w" * n}) for n in range(1, 30)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")

    corpus = run(tmp_path / "d.jsonl", tmp_path / "o", "--heldout=0")

    assert all_texts(corpus) == {f"d.jsonl:{n}": "w" * n for n in range(1, 30)}


def test_gzipped_files_give_the_same_documents(tmp_path):
    for folder, write in (("a", bytes), ("b", gzip.compress)):
        suffix = ".gz" if folder == "b" else ""
        (tmp_path / folder).mkdir()
        lines = b'{"text": "one"}\n{"text": "two"}\n'
        (tmp_path / folder / f"l.jsonl{suffix}").write_bytes(write(lines))
        (tmp_path / folder / f"t.txt{suffix}").write_bytes(write("tëxt".encode()))

    plain, zipped = (
        run(tmp_path / f, tmp_path / f"out-{f}", "--heldout=0") for f in "ab"
    )

    assert list(all_texts(plain).values()) == ["one", "two", "tëxt"]
    assert list(all_texts(zipped).values()) == ["one", "two", "tëxt"]


def test_only_known_suffixes_that_are_not_excluded_are_read(tmp_path):
    kept = ["a.py", "b/c.md", "b/d.RST", "e.txt"]
    left = ["x.bin", ".hidden.py", ".git/y.py", "__pycache__/z.py", "tests/t.py",
            "b/tests/u.py", "b/v_pb2.py"]  # fmt: skip
    for name in kept + left:
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    options = ["--exclude=tests", "--exclude=*_pb2.py", "--heldout=0"]
    corpus = run(tmp_path / "src", tmp_path / "o", *options)

    assert sorted(all_texts(corpus)) == sorted(f"src/{name}" for name in kept)


def test_a_file_named_directly_may_have_any_suffix_and_counts_once(tmp_path):
    (tmp_path / "notes.log").write_text("text")
    argv = [f"--input={tmp_path / 'notes.log'}"] * 2

    prepare.main([*argv, f"--output={tmp_path / 'o'}", "--heldout=0"])

    assert all_texts(Corpus.open(tmp_path / "o")) == {"notes.log": "text"}


def test_names_with_line_feeds_and_backslashes_come_back(tmp_path):
    (tmp_path / "s").mkdir()
    names = ["a\nb.txt", "c\\nd.txt", "e\\.txt", "f\u2028g.txt"]
    for name in names:
        (tmp_path / "s" / name).write_text("t")

    corpus = run(tmp_path / "s", tmp_path / "o", "--heldout=0")

    assert set(all_texts(corpus)) == {f"s/{name}" for name in names}


def test_copies_of_a_document_fall_on_the_same_side(tmp_path):
    lines = [json.dumps({"text": f"document {i % 40}"}) for i in range(120)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))

    corpus = run(tmp_path / "d.jsonl", tmp_path / "o", "--heldout=0.3")

    train, heldout = (set(texts_of(corpus, s).values()) for s in ("train", "heldout"))
    assert not train & heldout and len(train | heldout) == 40
    for text in train | heldout:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        assert (text in heldout) == (int.from_bytes(digest, "little") / 2**64 < 0.3)


def test_empty_documents_are_counted_and_skipped(tmp_path, capsys):
    texts = ["one", "", " \n", "two"]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))

    corpus = run(tmp_path / "d.jsonl", tmp_path / "o", "--heldout=0")

    assert corpus.manifest["skipped_empty"] == 2
    assert list(all_texts(corpus).values()) == ["one", "two"]
    printed = capsys.readouterr()
    assert "2 empty documents skipped" in printed.out
    assert (
        "train: 2 documents, 10 tokens, 6 bytes, 0.600 bytes per token" in printed.out
    )
    assert printed.err == ""


def test_a_tokenizer_is_trained_on_the_train_split_alone(source, tmp_path):
    corpus = run(source, tmp_path / "out", "--train_tokenizer=285", "--heldout=0.3")

    model = train_sentencepiece(iter(texts_of(corpus, "train").values()), 285)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model
    assert corpus.manifest["tokenizer"]["vocab_size"] == 285
    assert (tmp_path / "out" / "train-00000.tokens").stat().st_size == (
        2 * corpus.manifest["splits"]["train"]["tokens"]
    )
    assert all_texts(corpus) == {
        f"src/{p.name}": p.read_text() for p in source.iterdir()
    }


def test_a_given_model_is_used_and_copied(source, tmp_path):
    model = train_sentencepiece(iter(["x = 1\n" * 50]), 265)
    (tmp_path / "given.model").write_bytes(model)

    corpus = run(source, tmp_path / "out", f"--tokenizer={tmp_path / 'given.model'}")

    assert corpus.manifest["tokenizer"]["name"] == "given.model"
    given = load_tokenizer(str(tmp_path / "given.model"))
    assert corpus.tokenizer.fingerprint == given.fingerprint


def test_the_manifest_has_no_path_of_the_machine(source, tmp_path, monkeypatch):
    run(source, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    run("./src", "relative")

    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    manifest = json.loads((tmp_path / "relative" / "manifest.json").read_text())
    assert manifest["options"]["input"] == ["./src"]


def test_documents_pickle_without_their_memory_maps(source, tmp_path):
    documents = run(source, tmp_path / "out").documents("train")
    whole = documents.tokens(3)

    again = pickle.loads(pickle.dumps(documents))

    assert len(pickle.dumps(documents)) < 2000
    np.testing.assert_array_equal(again.tokens(3), whole)
    np.testing.assert_array_equal(again.tokens(3, 2, 5), whole[2:5])
    assert again.name(3) == documents.name(3)
    with pytest.raises(IndexError):
        again.tokens(len(documents))
