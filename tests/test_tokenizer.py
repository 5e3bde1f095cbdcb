"""Tokenizers: what goes in comes out, and the vocabulary is accounted for."""

import hashlib
import io
import random
import subprocess
import sys

import json_tokenizers
import numpy as np
import pytest
import sentencepiece
from runs import ROOT

from mtp_jax.data import sentencepiece_tokenizer as sentencepieces
from mtp_jax.data import tokenizer as tokenizers
from mtp_jax.errors import UserError

DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared" / "data" / "tokenizers"
CODE = "def add(a, b):\n    return a + b  # naïve\n\nprint(add(12, 345))\n" * 20
HARD_TEXTS = [
    "",
    "plain",
    "  spaces   kept  \t\t",
    "line\r\nline\rline\n\n\n",
    "nul\x00and\x01\x7f",
    "é 漢字 😀👩‍👩‍👧 \u2028 \u2029 \x85 \ufeff \ufffd",
    "\u2581 the mark \u2581\u2581 itself\u2581",
    "<s> </s> <unk> <0x41> \u2047",
    "\U0010ffff\u0301",
]


@pytest.fixture(scope="module")
def pieces():
    model = sentencepieces.train_sentencepiece(iter([CODE]), 310)
    return sentencepieces.SentencePieceTokenizer(model, "code.model")


@pytest.fixture(params=tokenizers.KINDS)
def tokenizer(request, pieces):
    if request.param == "tokenizer.json":
        return json_tokenizers.loaded(json_tokenizers.byte_level([CODE]))
    return pieces if request.param == "sentencepiece" else tokenizers.ByteTokenizer()


def random_texts(n):
    draw = random.Random(0)
    ranges = [(0, 128), (0, 0xD800), (0xE000, 0x110000), (0x2580, 0x2583)]
    for _ in range(n):
        bounds = draw.choices(ranges, k=20)
        yield "".join(chr(draw.randrange(*bound)) for bound in bounds)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_text_round_trips_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_text_round_trips_exactly(tokenizer):
    for text in random_texts(500):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_piece_bytes_add_up_to_the_size_of_the_text(tokenizer):
    sizes_V = tokenizer.piece_bytes()

    assert sizes_V.shape == (tokenizer.vocab_size,) and sizes_V.dtype == np.int32
    assert sizes_V[tokenizer.bos_id] == sizes_V[tokenizer.eos_id] == 0
    for text in [*HARD_TEXTS, CODE, *random_texts(100)]:
        assert sizes_V[tokenizer.encode(text)].sum() == len(text.encode()), text


def test_begin_and_end_of_text_are_not_encoded_but_dropped_in_decoding(tokenizer):
    ids = tokenizer.encode("some text <s></s>")

    assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]).any()
    framed = [tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.bos_id, *ids]
    assert tokenizer.decode(framed) == "some text <s></s>" * 2


def test_spans_are_the_characters_of_each_token(tokenizer):
    """Of every character, the tokens that stand for it hold its bytes."""
    for text in [*HARD_TEXTS, CODE, *random_texts(100)]:
        ids, spans = tokenizer.encode_spans(text)

        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert ids.dtype == spans.dtype == np.int32 and spans.shape == (len(ids), 2)
        sizes = tokenizer.piece_bytes()[ids]
        at = 0
        for (begin, end), size in zip(spans.tolist(), sizes.tolist(), strict=True):
            before = len(text[:begin].encode())
            assert before <= at and at + size <= len(text[:end].encode()), text
            assert at < len(text[: begin + 1].encode())
            at += size


def test_byte_ids_are_the_bytes_of_utf8():
    ids = tokenizers.ByteTokenizer().encode("é😀")

    assert ids.tolist() == [0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80]
    assert ids.dtype == np.int32


def test_byte_specials_never_occur_in_utf8():
    every_character = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))

    assert not {0xFE, 0xFF} & set(every_character.encode())


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character():
    assert tokenizers.ByteTokenizer().decode([0x61, 0xC3, 0x62]) == "a\ufffdb"


def test_training_twice_gives_the_same_model(pieces):
    again = sentencepieces.train_sentencepiece(iter([CODE]), 310)

    assert again == pieces.model_bytes
    assert pieces.fingerprint == hashlib.sha256(again).hexdigest()
    assert pieces.vocab_size == 310


def test_digits_and_line_feeds_are_pieces_of_their_own(pieces):
    assert len(pieces.encode("345")) == 3
    assert len(pieces.encode("\n\n")) == 2


def test_a_line_longer_than_the_trainer_takes_is_learned_from():
    line = "abcdefgh " * 2000
    model = sentencepieces.train_sentencepiece(iter([line]), 275)
    learned = sentencepieces.SentencePieceTokenizer(model, "long")

    assert len(learned.encode(line)) < len(line) / 2
    assert learned.decode(learned.encode(line)) == line


@pytest.mark.parametrize(
    ("asked", "word"), [(10, "at least"), (200, "at least"), (5000, "at most")]
)
def test_a_vocabulary_that_cannot_be_is_refused_with_one_that_can(asked, word):
    texts = ["hello hello world"]
    with pytest.raises(
        UserError, match=f"{asked} is too .*; give {word} \\d+"
    ) as found:
        sentencepieces.train_sentencepiece(iter(texts), asked)

    bound = int(str(found.value).rstrip(".").split()[-1])
    model = sentencepieces.train_sentencepiece(iter(texts), bound)
    assert sentencepieces.SentencePieceTokenizer(model, "m").vocab_size == bound


def test_training_without_text_is_refused():
    with pytest.raises(UserError, match="no text"):
        sentencepieces.train_sentencepiece(iter(["", "\n"]), 300)


def test_a_model_file_loads_and_saves(pieces, tmp_path):
    (tmp_path / "x.model").write_bytes(pieces.model_bytes)

    loaded = tokenizers.load_tokenizer(str(tmp_path / "x.model"))
    tokenizers.save_tokenizer(loaded, tmp_path)
    again = tokenizers.tokenizer_from_dir(tmp_path, "sentencepiece")

    assert loaded.name == "x.model"
    assert again.fingerprint == loaded.fingerprint == pieces.fingerprint
    np.testing.assert_array_equal(again.encode(CODE), pieces.encode(CODE))


def test_the_byte_tokenizer_saves_no_file(tmp_path):
    tokenizers.save_tokenizer(tokenizers.load_tokenizer("bytes"), tmp_path)

    assert list(tmp_path.iterdir()) == []
    assert tokenizers.tokenizer_from_dir(tmp_path, "bytes").kind == "bytes"


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_missing_or_invalid_model_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.model"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(UserError, match=r"broken\.model"):
        tokenizers.load_tokenizer(str(path))


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="words"):
        tokenizers.tokenizer_from_dir(tmp_path, "words")


def test_a_model_without_begin_and_end_of_text_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world"] * 5),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=3,
    )
    with pytest.raises(UserError, match=r"other\.model has no id for begin or end"):
        sentencepieces.SentencePieceTokenizer(model.getvalue(), "other.model")


def made_by_default():
    """A model by the library's own options: pieces by likelihood, a dummy prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((DATA / "verses.txt").read_text().splitlines()),
        model_writer=model,
        vocab_size=450,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=3,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    "path", [None, *SHARED.glob("*.model")], ids=lambda path: path and path.name
)
def test_a_model_from_elsewhere_encodes_and_decodes(tmp_path, path):
    if path is None:
        path = tmp_path / "foreign.model"
        path.write_bytes(made_by_default())
    foreign = tokenizers.load_tokenizer(str(path))

    text = "The quick brown fox, 12 times."
    ids = foreign.encode(text)

    assert foreign.decode(ids) == text
    # Its dummy prefix is a space that is not in the text.
    assert foreign.piece_bytes()[ids].sum() == len(text) + 1


def test_tokenizers_load_without_jax():
    code = """import sys, mtp_jax.data.prepare, mtp_jax.data.packing
assert 'jax' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)
