"""Texts, streams, stop strings and views are those of prompt and text together."""

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece

from mtp_jax.data.sentencepiece_tokenizer import (
    SentencePieceTokenizer,
    train_sentencepiece,
)
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.batch import Texts
from mtp_jax.decode.decoders.plain import Plain
from mtp_jax.decode.decoders.sampling import Sampling
from mtp_jax.decode.generation import generation_of
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.text_stream import Continuation
from mtp_jax.errors import UserError
from mtp_jax.reports.jsonl_output import generate_to_file
from mtp_jax.reports.token_view import page, spans, terminal

LINES = ["the state of the model", "a text of the model and the state"] * 30
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def llamas():
    """A SentencePiece model as its trainer makes one by default, and Llama's is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=3,
        hard_vocab_limit=False,
    )
    return SentencePieceTokenizer(model.getvalue(), "llama's")


@pytest.fixture(scope="module")
def ours():
    return SentencePieceTokenizer(train_sentencepiece(iter(LINES), 280), "ours")


def written(tokenizer, prompt, new):
    """A batch of one text, of the ids of a prompt and those after it."""
    row = np.array([[tokenizer.bos_id, *prompt, *new]], np.int32)
    start, end = 1 + len(prompt), row.shape[1]
    forward = np.zeros_like(row)
    forward[0, start:] = np.arange(len(new))
    return Texts(
        row, forward, 0 * row, None, np.array([end]), np.array([True]),
        np.array([start]),
    )  # fmt: skip


class Speaking(Generator):
    """A generator whose model says what it is told, a token a forward pass."""

    def __init__(self, tokenizer, prompt, new):
        self.tokenizer, self.cfg = tokenizer, dataclasses.make_dataclass("C", [])()
        self.cfg.n_future_tokens, self.cfg.vocab_size = 1, tokenizer.vocab_size
        self.max_prompt_tokens, self._ids = None, tokenizer.vocab_size
        self._programs = type("P", (), {"compile_s": 0.0})()
        self._whole, self._count = written(tokenizer, prompt, new), len(new)

    def _batch(self, rows, *args):
        args[-1].start()
        self._said = 0

    def _advance(self, batch, forwards, stop, count):
        self._said = min(self._said + forwards, self._count)
        texts = self._whole
        length_B = texts.start_B + self._said
        done_B = length_B == texts.length_B
        made = dataclasses.replace(texts, length_B=length_B, done_B=done_B)
        done_B |= bool(stop) and self._stops(made, 0, stop)
        return made


def cases(llamas, ours):
    accents = "naïve €5 日本語 🙂"
    texts = [("the state of", " the model"), ("the", " the the"), ("a", " b  c"),
             ("na", "ïve"), ("日", "本 語"), (" ", " x")]  # fmt: skip
    for tokenizer in (BYTES, llamas, ours):
        for prompt, more in texts:
            whole = tokenizer.encode(prompt + more).tolist()
            first = tokenizer.encode(prompt).tolist()
            if whole[: len(first)] == first:
                yield tokenizer, first, whole[len(first) :]
        ids = tokenizer.encode(accents).tolist()
        for cut in range(1, len(ids)):  # within characters, too
            yield tokenizer, ids[:cut], ids[cut:]


def test_prompt_and_continuation_are_the_text_of_both(llamas, ours):
    seen = 0
    for tokenizer, prompt, new in cases(llamas, ours):
        whole = tokenizer.decode([*prompt, *new])
        generator = Speaking(tokenizer, prompt, new)
        result = generation_of(tokenizer, written(tokenizer, prompt, new), 0, [], 0)
        assert result.prompt + result.text == whole
        pieces = generator.stream(np.array(prompt), max_new_tokens=99, decoder="plain")
        assert generator.prompt_text(np.array(prompt)) + "".join(pieces) == whole
        assert "\ufffd" not in result.prompt + result.text
        assert "".join(s.text for s in spans(result, tokenizer)) == result.text
        assert terminal(result, tokenizer) == whole
        seen += 1
    assert seen > 60


def test_the_space_before_a_word_is_there(llamas):
    ids = llamas.encode("the state of the model").tolist()
    first = llamas.encode("the state of").tolist()
    assert ids[: len(first)] == first
    texts = written(llamas, first, ids[len(first) :])

    result = generation_of(llamas, texts, 0, [], 0)

    assert (result.prompt, result.text) == ("the state of", " the model")
    timed = dataclasses.replace(result, tokens_per_s=1.0)
    before, _, shown = page([timed], llamas, "t").partition("the state of</span>")
    assert before.endswith('class="prompt">') and "> the<" in shown
    row = json.loads(json.dumps(dataclasses.asdict(result)))
    assert row["text"] == " the model"
    assert row["prompt_tokens"] == [llamas.bos_id, *first]
    stopped = generation_of(llamas, texts, 0, [" model"], 0)
    assert (stopped.text, stopped.finish) == (" the", "stop")
    # Alone the tokens would be without it.
    assert llamas.decode(ids[len(first) :]) == "the model"


def test_a_stream_ends_before_a_stop_string_that_begins_with_a_space(llamas):
    ids = llamas.encode("the state of the model").tolist()
    first = llamas.encode("the state of").tolist()
    generator = Speaking(llamas, first, ids[len(first) :])

    pieces = generator.stream(np.array(first), max_new_tokens=99, stop=" model",
                              decoder="plain")  # fmt: skip

    assert "".join(pieces) == " the"


def test_a_prompt_that_is_nothing_takes_nothing_off(llamas):
    ids = llamas.encode("the model").tolist()
    assert Continuation(llamas, [llamas.bos_id]).decode(ids) == "the model"
    assert Continuation(BYTES, []).decode([32, 97]) == " a"


@pytest.mark.parametrize("name", ["bytes", "llamas", "ours"])
def test_ids_that_only_begin_a_character_are_counted(name, request):
    tokenizer = BYTES if name == "bytes" else request.getfixturevalue(name)
    ids = tokenizer.encode("x🙂").tolist()
    counts = [tokenizer.unfinished(ids[: len(ids) - i]) for i in range(5)]
    assert counts == [0, 3, 2, 1, 0]
    assert tokenizer.unfinished([]) == 0


def test_a_prompt_file_of_before_goes_on(tmp_path):
    """Prompts that end within a character had U+FFFD for it."""
    prompt = np.array([0x61, 0xC3])
    generator = Speaking(BYTES, prompt.tolist(), [0xA9])
    settings = {"step": 1, "decoder": Plain(), "sampling": Sampling(),
                "max_new_tokens": 4, "stop": []}  # fmt: skip
    file = tmp_path / "out.jsonl"
    assert generate_to_file(generator, str(file), [prompt], **settings) == 0
    row = json.loads(file.read_text())
    assert (row["prompt"], row["text"]) == ("a", "é")
    file.write_text(json.dumps({**row, "prompt": "a\ufffd"}) + "\n")
    assert generate_to_file(generator, str(file), [prompt], **settings) == 1


def test_one_text_is_one_prompt(tmp_path):
    generator = Speaking(BYTES, BYTES.encode("ab").tolist(), [0x63])
    options = {"max_new_tokens": 4, "decoder": "plain"}
    for prompt in ("ab", np.array([97, 98]), [97, 98], ["ab"], [np.array([97, 98])]):
        [result] = generator.generate(prompt, **options)
        assert (result.prompt, result.text) == ("ab", "c")
    assert generator.generate([], **options) == []
    with pytest.raises(UserError, match="given as bytes"):
        generator.generate(b"ab", **options)
    file = tmp_path / "out.jsonl"
    settings = {"step": 1, "decoder": Plain(), "sampling": Sampling(), "stop": []}
    generate_to_file(generator, str(file), "ab", max_new_tokens=4, **settings)
    assert len(file.read_text().splitlines()) == 1


def test_one_stop_string_is_one():
    generator = Speaking(BYTES, [97], BYTES.encode("b, c").tolist())
    [result] = generator.generate("a", max_new_tokens=9, decoder="plain", stop=", ")
    assert (result.text, result.finish) == ("b", "stop")
