"""Text as it is written: never half a character, never a part of a stop string."""

import random

import numpy as np
import pytest

from mtp_jax.data.sentencepiece_tokenizer import (
    SentencePieceTokenizer,
    train_sentencepiece,
)
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.text_stream import before_stop, find_stop, settled, token_texts

BYTES = ByteTokenizer()
TEXT = "naïve €5 → 日本語 🙂 end, a stop or a sto"


@pytest.fixture(scope="module")
def sentencepiece():
    # A small vocabulary: rare characters are bytes of it.
    model = train_sentencepiece(iter(["a stop or a sto\n" * 40]), 272)
    return SentencePieceTokenizer(model, "test")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_what_is_settled_never_changes(kind, sentencepiece):
    tokenizer = BYTES if kind == "bytes" else sentencepiece
    ids = tokenizer.encode(TEXT).tolist()
    assert len(ids) > len(TEXT) // 2
    before = ""
    for count in range(len(ids) + 1):
        text = settled(tokenizer.decode(ids[:count]), ())
        assert text.startswith(before) and TEXT.startswith(text)
        before = text
    assert before == TEXT


def test_bytes_that_are_no_text_stay_as_they_are_shown():
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.choice([0x61, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xF0]) for _ in range(9)]
        whole = BYTES.decode(ids)
        for count in range(10):
            assert whole.startswith(settled(BYTES.decode(ids[:count]), ()))
        assert "".join(token_texts(BYTES, ids)) == whole


def slow_end(text, stop):
    """Where the text stops if it comes a character at a time."""
    for end in range(len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            return text[: min(found)]
    return text


def test_nothing_that_a_stop_string_takes_back_is_shown():
    rng = random.Random(1)
    stops = [("ab",), ("aab", "ba"), ("abc", "bb"), ("aaaa", "c")]
    for trial in range(400):
        stop = stops[trial % len(stops)]
        text = "".join(rng.choice("abc") for _ in range(10))
        end = slow_end(text, stop)
        for count in range(len(text) + 1):
            so_far = text[:count]
            if any(s in so_far for s in stop):
                break
            assert end.startswith(settled(so_far, stop))


def test_an_end_that_cannot_become_a_stop_string_is_shown_at_once():
    assert settled("stop or sto", ("stop",)) == "stop or "
    assert settled("stop or sta", ("stop",)) == "stop or sta"
    assert settled("x", ("x",)) == "x", "a whole one is not for this function to find"


def test_a_stop_string_is_found_whatever_its_tokens_are(sentencepiece):
    text = "a stop or a sto"
    ids = sentencepiece.encode(text).tolist()
    stop = "p o"  # reaches into several pieces and is none
    alone = sentencepiece.encode(stop).tolist()
    assert not any(ids[i : i + len(alone)] == alone for i in range(len(ids))), (
        "its own tokens are not among those of the text"
    )
    count = find_stop(sentencepiece, ids, [stop])
    assert stop in sentencepiece.decode(ids[:count])
    assert stop not in sentencepiece.decode(ids[: count - 1])
    assert before_stop(text, [stop, "nowhere"]) == "a sto"
    assert find_stop(sentencepiece, ids, ["nowhere"]) is None


def test_pieces_give_a_character_to_its_last_token():
    ids = np.frombuffer("aé€".encode(), np.uint8).tolist()
    assert token_texts(BYTES, ids) == ["a", "", "é", "", "", "€"]
    assert token_texts(BYTES, ids[:-1]) == ["a", "", "é", "", "\ufffd"]
