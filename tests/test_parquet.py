"""Rows of .parquet files are documents, as lines of .jsonl are."""

import pathlib

import chats
import json_tokenizers
import pytest
from corpora import contents
from json_tokenizers import MARKED, byte_level

from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prepare import prepare
from mtp_jax.errors import UserError

pyarrow = pytest.importorskip("pyarrow")


def write(path, rows):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def names_apart(folder):
    """What a corpus holds, but for the names of its documents and files."""
    found = contents(pathlib.Path(folder))
    return {k: v for k, v in found.items() if not k.endswith((".names", ".json"))}


def test_texts_of_rows_are_those_of_lines(tmp_path):
    rows = [{"text": f"text {i} naïve", "other": i, "when": None} for i in range(2500)]
    write(tmp_path / "a.parquet", rows)
    chats.write(tmp_path / "b.jsonl", rows)
    for name, source in (("a", "a.parquet"), ("b", "b.jsonl")):
        prepare(tmp_path / source, tmp_path / name, heldout=0.1, workers=2)

    assert names_apart(tmp_path / "a") == names_apart(tmp_path / "b")
    documents = Corpus.open(tmp_path / "a").documents("train")
    assert documents.name(0).startswith("a.parquet:")


def test_conversations_of_rows_are_those_of_lines(tmp_path):
    made = byte_level([chats.VOCABULARY])
    tokenizer = json_tokenizers.write(tmp_path / "t", made, MARKED)
    rows = [{"messages": m, "id": i} for i, m in enumerate(chats.drawn(30))]
    write(tmp_path / "a.parquet", rows)
    chats.write(tmp_path / "b.jsonl", rows)
    for name, source in (("a", "a.parquet"), ("b", "b.jsonl")):
        prepare(tmp_path / source, tmp_path / name, tokenizer=tokenizer, heldout=0.1,
                format="chat", workers=1)  # fmt: skip

    assert names_apart(tmp_path / "a") == names_apart(tmp_path / "b")


def test_a_folder_of_rows_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        write(tmp_path / "in" / f"{i}.parquet", [{"text": f"text {i}"}] * 2)
    told = []
    prepare(tmp_path / "in", tmp_path / "out", heldout=0, workers=1,
            report=told.append)  # fmt: skip
    assert told == ["read: 3 .parquet"]
    assert len(Corpus.open(tmp_path / "out").documents("train")) == 6


def test_what_is_no_parquet_and_lacks_the_field_is_refused(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read \("):
        prepare(tmp_path / "bad.parquet", tmp_path / "out", workers=1)
    write(tmp_path / "a.parquet", [{"body": "x"}])
    with pytest.raises(
        UserError, match=r"a\.parquet:1 has no field 'text'; it has bod"
    ):
        prepare(tmp_path / "a.parquet", tmp_path / "out", workers=1)
