"""Refusals: of the verb prepare, and by Corpus of files that are damaged."""

import gzip

import pytest
from corpora import contents, run

from mtp_jax.cli import prepare
from mtp_jax.data.corpus import Corpus, verify_files
from mtp_jax.data.sentencepiece_tokenizer import train_sentencepiece
from mtp_jax.errors import UserError


def refused(tmp_path, name, content, *options, match):
    """Preparing this file is refused, and leaves nothing behind."""
    (tmp_path / name).write_bytes(content)
    before = set(tmp_path.iterdir())
    argv = [f"--input={tmp_path / name}", f"--output={tmp_path / 'out'}", "--workers=1"]
    with pytest.raises(UserError, match=match) as found:
        prepare.main([*argv, *options])
    assert "\n" not in str(found.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 at byte 3 \(0xff\).*--exclude"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2 is not a JSON object"),
        ("a.jsonl", b'{"body": "a"}\n', r"a\.jsonl:1 has no field 'text'; it has body"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: field 'text' is not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: character 0 .*surrogate"),
        ("a.jsonl", b'{"text": "a"}\n\xc3\n', r"a\.jsonl:2 is not UTF-8 at byte 0"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not JSON"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9],
            r"gz cannot be read",
        ),
        ("a.txt", b"", "corpus is empty.*1 empty"),
    ],
)
def test_bad_input_is_refused_by_file_and_place(tmp_path, name, content, match):
    refused(tmp_path, name, content, match=match)
    refused(tmp_path, name, content, "--train_tokenizer=300", match=r".")


def test_bad_input_in_a_worker_is_refused_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr("mtp_jax.data.documents._BLOCK_BYTES", 10)
    monkeypatch.setattr("mtp_jax.data.tokenizing._TASK_PARTS", 2)
    lines = b'{"text": "abcd"}\n' * 20 + b"oops\n"

    refused(tmp_path, "a.jsonl", lines, "--workers=2", match=r"a\.jsonl:21 is not JSON")


def test_a_split_without_documents_is_refused_unless_asked_for(tmp_path):
    refused(tmp_path, "a.txt", b"single", "--heldout=0.000001", match="no held-out")
    refused(tmp_path, "a.txt", b"single", "--heldout=0.999999", match="to train on")

    corpus = run(tmp_path / "a.txt", tmp_path / "out", "--heldout=0")
    assert len(corpus.documents("heldout")) == 0
    assert corpus.documents("heldout").lengths.tolist() == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--heldout=1"], "heldout.*not a number in"),
        (["--heldout=nan"], "heldout.*not a number in"),
        (["--workers=0"], "workers.*above 0"),
        (["--shard_tokens=many"], "shard_tokens.*above 0"),
        (["--tok=bytes"], "unrecognized arguments: --tok=bytes"),
        (["--tokenizer=no.model"], r"no\.model cannot be read"),
        (["--tokenizer=no.model", "--train_tokenizer=300"], "exclude each other"),
        (["--train_tokenizer=10"], "give at least"),
        (["--train_tokenizer=9999"], "give at most"),
        (["--exclude=a.txt"], "no file to read"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, match):
    refused(tmp_path, "a.txt", b"some text", *options, match=match)


def test_missing_options_and_missing_input_are_refused(tmp_path):
    with pytest.raises(UserError, match="required: --output"):
        prepare.main(["--input=x"])
    with pytest.raises(UserError, match="nowhere does not exist"):
        prepare.main(["--input=nowhere", f"--output={tmp_path / 'o'}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no file to read .*\.jsonl"):
        prepare.main([f"--input={tmp_path / 'empty'}", f"--output={tmp_path / 'o'}"])


def test_an_earlier_result_is_replaced_only_with_force(source, tmp_path):
    out = tmp_path / "out"
    run(source, out, "--shard_tokens=200")
    before = contents(out)

    with pytest.raises(UserError, match="--force"):
        run(source, out)
    assert contents(out) == before
    (source / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        run(source, out, "--force")
    assert contents(out) == before

    (source / "bad.txt").unlink()
    run(source, out, "--force")
    run(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    assert {p.name for p in tmp_path.iterdir()} == {"src", "out", "fresh"}


@pytest.mark.parametrize("with_manifest", [False, True])
def test_files_of_others_are_never_replaced(source, tmp_path, with_manifest):
    out = tmp_path / "out"
    if with_manifest:
        run(source, out)
    out.mkdir(exist_ok=True)
    (out / "thesis.txt").write_text("years of work")

    with pytest.raises(UserError, match=r"did not write \(thesis\.txt\)"):
        run(source, out, "--force")
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_output_that_is_a_file_is_refused_and_an_empty_folder_taken(
    source, tmp_path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(source, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        run(source, tmp_path / "file" / "below")

    (tmp_path / "folder").mkdir()
    run(source, tmp_path / "folder")


def test_a_directory_that_is_no_corpus_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"not a prepared corpus.*prepare --input"):
            Corpus.open(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not JSON"),
        ("[]", "format None"),
        ('{"format": 99}', "format 99; this version reads formats 1, 2 and 3"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "tokenizer": 3}', "damaged"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, text, match):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=match):
        Corpus.open(tmp_path)


@pytest.mark.parametrize("kind", ["tokens", "offsets", "names"])
def test_a_flipped_byte_is_found(source, tmp_path, kind):
    corpus = run(source, tmp_path / "out")
    verify_files(corpus)
    path = tmp_path / "out" / f"train-00000.{kind}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    corpus = Corpus.open(tmp_path / "out")
    verify_files(corpus, ["heldout"])
    with pytest.raises(UserError, match=rf"train-00000\.{kind} is damaged.*prepare"):
        verify_files(corpus, ["train"])


def test_processes_that_share_the_verification_check_every_file(source, tmp_path):
    corpus = run(source, tmp_path / "out", "--shard_tokens=300")
    damaged = sorted((tmp_path / "out").glob("*-0*"))
    for path in damaged:
        path.write_bytes(bytes(path.stat().st_size))

    found = set()
    for index in range(len(damaged)):  # so many processes that each has one file
        with pytest.raises(UserError) as error:
            verify_files(corpus, part=(index, len(damaged)))
        found.add(str(error.value).split(" is damaged")[0])
    assert len(damaged) > 6
    assert found == {str(path) for path in damaged}
    with pytest.raises(UserError):
        verify_files(corpus, part=(1, 2))


@pytest.mark.parametrize("kind", ["tokens", "offsets", "names"])
def test_a_truncated_or_missing_shard_is_found_on_opening(source, tmp_path, kind):
    run(source, tmp_path / "out")
    path = tmp_path / "out" / f"heldout-00000.{kind}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"heldout-00000\.{kind} has \d+ bytes"):
        Corpus.open(tmp_path / "out")

    path.unlink()
    with pytest.raises(UserError, match=rf"heldout-00000\.{kind} is missing"):
        Corpus.open(tmp_path / "out")


def test_another_tokenizer_in_its_place_is_found(source, tmp_path):
    run(source, tmp_path / "out", "--train_tokenizer=285")
    path = tmp_path / "out" / "tokenizer.model"
    path.write_bytes(train_sentencepiece(iter(["other text"]), 280))
    with pytest.raises(UserError, match=r"tokenizer\.model is not the tokenizer"):
        Corpus.open(tmp_path / "out")

    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read"):
        Corpus.open(tmp_path / "out")
