"""Documents that are cut out of text files, and records that cannot be read."""

import codecs
import contextlib
import gzip
import io
import json
import pathlib

import pytest
import sentencepiece
from test_prepare import all_texts, contents, run

from mtp_jax.cli import prepare
from mtp_jax.data import prepare as library
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.sentencepiece_tokenizer import train_sentencepiece
from mtp_jax.errors import UserError

STORIES = [f"Story {i}.\nIt was the {i}th, and é.\n" for i in range(80)]
VERSES = pathlib.Path(__file__).parent / "data" / "verses.txt"


def refused(tmp_path, name, content, *options, match):
    """Preparing this file is refused, and leaves nothing behind."""
    (tmp_path / name).write_bytes(content)
    before = set(tmp_path.iterdir())
    argv = [f"--input={tmp_path / name}", f"--output={tmp_path / 'out'}", "--workers=1"]
    with pytest.raises(UserError, match=match):
        prepare.main([*argv, *options])
    assert set(tmp_path.iterdir()) == before


def in_order(corpus):
    """(name, text) of all documents of a corpus without a held-out split."""
    documents = corpus.documents("train")
    texts = (
        corpus.tokenizer.decode(documents.tokens(i)) for i in range(len(documents))
    )
    return [(documents.name(i), text) for i, text in enumerate(texts)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("block", [7, 100, 4_000_000])
def test_a_text_file_is_cut_at_a_separator(tmp_path, monkeypatch, block, pack):
    monkeypatch.setattr("mtp_jax.data.documents._BLOCK_BYTES", block)
    text = "<|endoftext|>\n".join(STORIES) + "<|endoftext|>\n\n<|endoftext|>"
    path = tmp_path / ("s.txt.gz" if pack is gzip.compress else "s.txt")
    path.write_bytes(pack(text.encode()))

    options = ["--split_at=<|endoftext|>", "--heldout=0"]
    found = in_order(run(path, tmp_path / "out", *options))

    assert [text for _, text in found] == [story.rstrip("\n") for story in STORIES]
    lines = text.split("\n")
    for name, story in found:
        number = int(name.removeprefix(f"{path.name}:"))
        assert lines[number - 1].removeprefix("<|endoftext|>") == story.split("\n")[0]


def test_a_separator_may_be_an_empty_line(tmp_path):
    (tmp_path / "s.md").write_text("one\nline\n\n\n\ntwo\n\nthree\n")
    run(tmp_path / "s.md", tmp_path / "out", r"--split_at=\n\n", "--heldout=0")
    found = in_order(Corpus.open(tmp_path / "out"))
    assert found == [("s.md:1", "one\nline"), ("s.md:6", "two"), ("s.md:8", "three")]


@pytest.mark.parametrize("size", [12, 33, 1000])
@pytest.mark.parametrize("block", [10, 4_000_000])
def test_a_text_file_is_cut_into_pieces_of_a_size(tmp_path, monkeypatch, size, block):
    monkeypatch.setattr("mtp_jax.data.documents._BLOCK_BYTES", block)
    text = "".join(STORIES) + "long" * 300 + "é€😀" * 200 + "\nend"
    (tmp_path / "s.txt").write_text(text)

    options = [f"--split_bytes={size}", "--heldout=0"]
    found = in_order(run(tmp_path / "s.txt", tmp_path / "out", *options))

    assert "".join(piece for _, piece in found) == text
    sizes = [len(piece.encode()) for _, piece in found]
    assert max(sizes) <= size
    begin = 0
    for i, (name, piece) in enumerate(found[:-1]):
        assert name == f"s.txt:{1 + text.count(chr(10), 0, begin)}"
        begin += len(piece)
        rest = text[begin:].encode()
        if piece.endswith("\n"):  # and the next line would not have fitted
            assert sizes[i] + len(rest.split(b"\n")[0]) + 1 > size
        elif not piece.endswith(" "):
            assert sizes[i] + len(text[begin].encode()) > size


@pytest.mark.parametrize("options", [{"split_bytes": 50}, {"split_at": "\n"}, {}])
def test_bytes_that_were_read_add_up_to_the_file(tmp_path, monkeypatch, options):
    monkeypatch.setattr("mtp_jax.data.documents._BLOCK_BYTES", 100)
    (tmp_path / "s.txt").write_text("".join(STORIES))
    read = []

    @contextlib.contextmanager
    def progress(title, size):
        yield read.append

    library.prepare(tmp_path / "s.txt", tmp_path / "out", heldout=0, workers=1,
                    progress=progress, **options)  # fmt: skip

    assert sum(read) == (tmp_path / "s.txt").stat().st_size


def test_one_text_file_is_a_corpus_with_a_heldout_split(tmp_path, capsys):
    argv = (VERSES, tmp_path / "out")
    corpus = run(*argv, "--split_bytes=100", "--heldout=0.2")
    assert len(corpus.documents("train")) > 3 and len(corpus.documents("heldout")) > 0
    assert corpus.manifest["options"]["split_bytes"] == 100


@pytest.mark.parametrize("heldout", [0.000001, 0.999999])
def test_one_text_file_that_is_not_cut_is_refused_with_the_way_out(tmp_path, heldout):
    match = r"--split_bytes=250 or with --split_at=TEXT"
    refused(tmp_path, "a.txt", b"a line\n" * 7143, f"--heldout={heldout}", match=match)


def test_lines_of_jsonl_are_not_cut(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n{"text": "four"}\n')
    corpus = run(tmp_path / "a.jsonl", tmp_path / "o", "--split_at= ", "--heldout=0")
    assert list(all_texts(corpus).values()) == ["one two three", "four"]


def test_workers_cut_the_same_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_jax.data.documents._BLOCK_BYTES", 300)
    monkeypatch.setattr("mtp_jax.data.tokenizing._TASK_PARTS", 2)
    (tmp_path / "s.txt").write_text("".join(STORIES))
    for workers in (1, 2):
        argv = (tmp_path / "s.txt", tmp_path / f"{workers}", "--split_bytes=64")
        run(*argv, f"--workers={workers}")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--split_at="], "split_at is empty"),
        (["--split_bytes=3"], "split_bytes is 3"),
        (["--split_bytes=9", "--split_at=x"], "not allowed with"),
    ],
)
def test_bad_cuts_are_refused(tmp_path, options, match):
    refused(tmp_path, "a.txt", b"some text", *options, match=match)


@pytest.mark.parametrize("cut", [(), ("--split_at=;",), ("--split_bytes=100",)])
def test_a_byte_order_mark_is_no_text(tmp_path, cut):
    (tmp_path / "s").mkdir()
    line = json.dumps({"text": "a line"}).encode()
    mark = codecs.BOM_UTF8
    (tmp_path / "s" / "a.txt").write_bytes(mark + b"\xef\xbb\xbfinside")
    (tmp_path / "s" / "b.md.gz").write_bytes(gzip.compress(mark + "é".encode()))
    (tmp_path / "s" / "c.jsonl").write_bytes(mark + line + b"\n" + line)

    corpus = run(tmp_path / "s", tmp_path / "o", "--heldout=0", *cut)

    found = [text for _, text in in_order(corpus)]
    assert found == ["\ufeffinside", "é", "a line", "a line"]
    assert corpus.manifest["splits"]["train"]["bytes"] == 9 + 2 + 6 + 6


BAD = {
    "half a surrogate pair": rb'{"text": "\ud800"}',
    "lack the field": b'{"body": "x"}',
    "not JSON": b'{"text": "x"',
    "not UTF-8": b'{"text": "\xff"}',
    "not a string": b'{"text": ["x"]}',
    "not an object": b'["text"]',
    "null": b'{"text": null}',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_refused_with_the_option_that_skips_it(tmp_path, kind):
    refused(tmp_path, "a.jsonl", BAD[kind], match=r"a\.jsonl:1.*--skip_bad")


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_skipped_and_counted(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr("mtp_jax.data.documents._BLOCK_BYTES", 50)
    monkeypatch.setattr("mtp_jax.data.tokenizing._TASK_PARTS", 2)
    good = [json.dumps({"text": f"good {i}"}).encode() for i in range(len(BAD))]
    lines = [x for pair in zip(BAD.values(), good, strict=True) for x in pair]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.jsonl").write_bytes(b"\n".join([*lines, BAD["null"]]))
    (tmp_path / "s" / "b.txt").write_bytes(b"latin \xe9")

    options = ["--skip_bad", "--heldout=0", f"--workers={workers}"]
    corpus = run(tmp_path / "s", tmp_path / "o", *options, "--train_tokenizer=275")

    assert [text for _, text in in_order(corpus)] == [f"good {i}" for i in range(7)]
    expected = {kind: 1 for kind in BAD} | {"not UTF-8": 2, "null": 2}
    assert corpus.manifest["skipped_bad"] == expected
    assert corpus.manifest["options"]["skip_bad"] is True
    assert "bad documents skipped: 1 half a surrogate" in capsys.readouterr().out


def test_what_cannot_be_read_is_no_bad_record(tmp_path):
    broken = gzip.compress(b'{"text": "a"}\n')[:-9]
    refused(tmp_path, "a.jsonl.gz", broken, "--skip_bad", match="cannot be read")
    refused(tmp_path, "b.jsonl", BAD["null"], "--skip_bad", match="empty.*, 1 bad ones")


def test_a_field_may_lie_within_another(tmp_path):
    lines = [{"a": {"b": {"c": "inner"}}}, {"a.b.c": "its very name", "a": {"b": 3}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--text_field=a.b.c", "--heldout=0"]
    corpus = run(tmp_path / "a.jsonl", tmp_path / "o", *options)
    assert [text for _, text in in_order(corpus)] == ["inner", "its very name"]

    for line in ('{"a": "x"}', '{"a": {"b": []}}', '{"b": 1}'):
        match = r"no field 'a\.b\.c'; it has .*OUTER\.INNER"
        refused(tmp_path, "b.jsonl", line.encode(), *options, match=match)


def test_a_tokenizer_that_changes_texts_is_told(tmp_path, capsys):
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words of a text"] * 20),
        model_writer=made, vocab_size=16, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "theirs.model").write_bytes(made.getvalue())
    own = train_sentencepiece(iter(["some words of a text"] * 20), 272)
    (tmp_path / "ours.model").write_bytes(own)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.txt").write_text("some words")
    (tmp_path / "s" / "b.txt").write_text("some  words")

    told = {}
    for name in ("theirs", "ours"):
        lines = []
        model = str(tmp_path / f"{name}.model")
        library.prepare(tmp_path / "s", tmp_path / name, tokenizer=model, heldout=0,
                        report=lines.append)  # fmt: skip
        told[name] = [line for line in lines if "changes texts" in line]

    assert told["ours"] == []
    assert told["theirs"] == [
        "theirs.model changes texts: 1 of 2 that were decoded again came back "
        "otherwise, for example s/b.txt: 'some  words' comes back as 'some words'"
    ]
