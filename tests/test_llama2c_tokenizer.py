"""Tokenizers of llama2.c: ids by its own rules, a known story, damaged files."""

import json
import shutil
import struct

import llamas
import pytest
from gguf_vocabularies import hundred_texts

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.data.json_tokenizer import JsonTokenizer
from mtp_jax.errors import UserError
from mtp_jax.interop.llama2c_tokenizer import llama2c_tokenizer
from mtp_jax.run.import_model import import_model

needs_stories = pytest.mark.skipif(
    not llamas.FOLDER.exists(), reason=f"{llamas.FOLDER} is not there"
)


def small_file(path, words=("ab", "abc", " a", "ba", " abc", "é")):
    """A file with the bytes, letters, and some longer pieces."""
    pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{i:02X}>".encode(), 0.0) for i in range(256)]
    pieces += [(c.encode(), -90.0 - i) for i, c in enumerate(" abc")]
    pieces += [(word.encode(), -float(i)) for i, word in enumerate(words)]
    data = struct.pack("<i", max(len(text) for text, _ in pieces))
    for text, score in pieces:
        data += struct.pack("<fi", score, len(text)) + text
    path.write_bytes(data)
    return path


def ids_by_run_c(path, text):
    """Ids of a text by the rules of llama2.c's run.c, bytes by loops."""
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + size], score))
        at += 8 + size
    of = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = [of[b" "]] if text else []
    for character in text:
        raw = character.encode()
        ids += [of[raw]] if raw in of else [byte + 3 for byte in raw]
    while True:
        best = None
        for i in range(len(ids) - 1):
            joined = of.get(pieces[ids[i]][0] + pieces[ids[i + 1]][0])
            if joined is not None and (best is None or pieces[joined][1] > best[0]):
                best = (pieces[joined][1], i, joined)
        if best is None:
            return ids
        ids[best[1] : best[1] + 2] = [best[2]]


def test_ids_are_those_of_run_c(tmp_path):
    path = small_file(tmp_path / "tok.bin")
    found = JsonTokenizer(llama2c_tokenizer(path), "test")

    for text in ["", "a", "abc abcab", "  ba é ab\n", "naïve 🙂", *hundred_texts()]:
        ids = ids_by_run_c(path, text)
        assert found.encode(text).tolist() == ids, text
        assert found.decode(ids) == text
    assert found.prompt_begin == (1,) and found.end_ids == (2, 1)
    assert found.decode([1, *found.encode("abc"), 2]) == "abc"


@needs_stories
def test_stories260k_comes_with_its_tokenizer(tmp_path):
    known = json.loads((llamas.FOLDER / "known_answers.json").read_text())
    for name in ("stories260K.bin", "tok512.bin"):
        shutil.copy(llamas.FOLDER / name, tmp_path)

    import_model(tmp_path, tmp_path / "run")

    found = restore_model(tmp_path / "run").tokenizer
    assert [1, *found.encode(known["prompt"])] == known["prompt_ids"]
    story = known["greedy_text"]
    assert found.decode(known["greedy_from_bos_ids"]) == story
    ids = found.encode(story).tolist()
    assert ids == ids_by_run_c(tmp_path / "tok512.bin", story)


@needs_stories
def test_a_tokenizer_of_llama2c_can_be_named(tmp_path):
    shutil.copy(llamas.FOLDER / "stories260K.bin", tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        import_model(tmp_path / "stories260K.bin", tmp_path / "run")
    named = str(llamas.FOLDER / "tok512.bin")

    import_model(tmp_path / "stories260K.bin", tmp_path / "run", tokenizer=named)

    assert restore_model(tmp_path / "run").tokenizer.vocab_size == 512


def test_damaged_files_are_refused_in_a_line(tmp_path):
    path = small_file(tmp_path / "tok.bin")
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-1],
        "empty": b"",
        "no bytes": whole[:100],
        "longer than the longest": struct.pack("<i", 3) + whole[4:],
        "negative": whole[:8] + struct.pack("<i", -4) + whole[12:],
        "not UTF-8": whole[:-1] + b"\xff",
    }
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"tok\.bin is cut, or none") as refused:
            llama2c_tokenizer(path)
        assert "\n" not in str(refused.value)
    small_file(path, ("ab", "ab"))
    with pytest.raises(UserError, match="twice"):
        llama2c_tokenizer(path)
    with pytest.raises(UserError, match="cannot be read"):
        llama2c_tokenizer(tmp_path / "tokens.bin")
