"""Prompts and passages: from files, and from held-out documents of any length."""

import codecs
import io
import itertools
import json
import sys
import types

import jax
import numpy as np
import pytest
from test_decode import init, one_device, tiny

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config, DataConfig, EvalConfig
from mtp_jax.data import prompts
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prepare import prepare
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode import calibrate
from mtp_jax.run.evaluation import HeldoutEvaluation

MARK = codecs.BOM_UTF8


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"def a\r\nimport os\r\n", ["def a", "import os"]),
        ("p.txt", b"def a\r\nimport os", ["def a", "import os"]),
        ("p.txt", b"def a\rimport os\r", ["def a", "import os"]),
        ("p.txt", MARK + b"def a\nimport os\n", ["def a", "import os"]),
        ("p.txt", MARK + b"def a\r\n", ["def a"]),
        ("p.txt", "a\u2028b\x85c\x0bd\n".encode(), ["a\u2028b\x85c\x0bd"]),
        ("p.jsonl", MARK + b'{"prompt": "a"}\r\n{"prompt": "b"}', ["a", "b"]),
        ("p.jsonl", b'{"prompt": "a\\r\\n"}\r\n\r\n{"prompt": "b"}', ["a\r\n", "b"]),
    ],
)
def test_prompts_are_read_as_text_is_read(
    tmp_path, monkeypatch, name, content, expected
):
    (tmp_path / name).write_bytes(content)
    assert prompts.read_prompts(str(tmp_path / name)) == expected
    if name == "p.txt":
        stdin = types.SimpleNamespace(buffer=io.BytesIO(content))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert prompts.read_prompts("-") == expected


def corpus_of(folder, lengths):
    """A corpus whose held-out texts have these lengths, no two parts of them equal."""
    texts = iter(itertools.count())
    folder.mkdir()
    with open(folder / "t.jsonl", "w") as file:
        for n in lengths:
            text = "".join(chr(0x100 + next(texts)) for _ in range(n // 2))
            file.write(json.dumps({"text": text + "x" * (n % 2)}) + "\n")
    prepare(folder / "t.jsonl", folder / "c", heldout=0.5, workers=1)
    return str(folder / "c")


class Counting:
    def __init__(self, lengths):
        self.sampled_lengths = np.array(lengths, np.uint64)

    def __len__(self):
        return len(self.sampled_lengths)

    def tokens(self, i, start=0, stop=None):
        return np.arange(self.sampled_lengths[i], dtype=np.int64)[start:stop] + 1000 * i


@pytest.fixture
def heldout(monkeypatch):
    """Makes held-out documents that count up from 1000 x their number."""

    def use(lengths):
        documents = Counting(lengths)
        opened = types.SimpleNamespace(
            documents=lambda split: documents, tokenizer=None
        )
        monkeypatch.setattr(Corpus, "open", lambda directory: opened)
        return documents

    return use


@pytest.mark.parametrize("k", [1, 7, 10, 30])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 1.0])
def test_heldout_prompts_never_repeat_where_places_suffice(heldout, k, share):
    lengths = np.random.default_rng(k).integers(3, 40, 30).tolist()
    heldout(lengths)
    places = [(i, b) for i, n in enumerate(lengths) for b in range(1, n - 1 - k + 1)]
    count = max(1, int(share * len(places)))

    found = prompts.heldout_prompts(["a"], count, k)

    begins = [divmod(int(p[0]), 1000) for p in found]
    assert len(found) == count == len(set(begins))
    assert set(begins) <= set(places)
    assert all(p.tolist() == list(range(int(p[0]), int(p[0]) + k)) for p in found)


def test_heldout_prompts_stay_spread_over_the_documents(heldout):
    heldout([12, 200, 13, 200, 200])  # 1, 189, 2, 189, 189 beginnings
    found = prompts.heldout_prompts(["a"], 20, 10)
    of_document = np.bincount([int(p[0]) // 1000 for p in found], minlength=5)
    assert of_document[[0, 2]].tolist() == [1, 2]
    assert of_document[[1, 3, 4]].min() >= 5 and of_document.sum() == 20


def test_passages_are_parts_of_documents_that_are_never_read_twice(heldout):
    heldout([2 + n for n in (3, 4, 10, 11, 14, 25)])
    everything = prompts.heldout_passages(["a"], 99, 4, 10)
    found = [(int(p[0]), len(p)) for p in everything]
    expected = [(1001, 4), (2001, 10), (3001, 10), (4001, 10), (4011, 4),
                (5001, 10), (5011, 10), (5021, 5)]  # fmt: skip
    assert found == expected
    some = prompts.heldout_passages(["a"], 4, 4, 10)
    assert [(int(p[0]), len(p)) for p in some] == expected[::2]
    assert prompts.heldout_passages(["a"], 4, 26, 30) == []


@pytest.mark.parametrize("lengths", [[3, 9, 5], [3, 60, 9, 34, 35], [34], [3]])
def test_a_sample_prompt_lies_inside_a_document(heldout, lengths):
    documents = heldout(lengths)
    made = []

    def generate(given, max_new_tokens):
        made.append(given[0])
        return [types.SimpleNamespace(prompt="", text="")]

    run = HeldoutEvaluation.__new__(HeldoutEvaluation)
    run._merge = lambda params: params
    run._corpora = [Corpus.open("a")]
    run._cfg = Config(eval=EvalConfig(sample_prompt_tokens=32))
    run._generator = types.SimpleNamespace(use=lambda params: None, generate=generate)
    run._tokenizer = types.SimpleNamespace(decode=lambda ids: "")
    key = jax.random.key_data(jax.random.key(0))
    state = types.SimpleNamespace(key=key, params=None)
    for step in range(20):
        run._sample(state, step)

    longest = max(lengths) - 2
    for prompt in made:
        i, begin = divmod(int(prompt[0]), 1000)
        assert begin >= 1 and begin + len(prompt) <= lengths[i] - 1
        assert len(prompt) == min(32, longest)
        np.testing.assert_array_equal(
            prompt, documents.tokens(i, begin, begin + len(prompt))
        )


def test_ranks_of_passages_do_not_depend_on_those_beside_them():
    cfg, mesh = tiny(3, 4), one_device()
    params = init(cfg, mesh)
    rng = np.random.default_rng(4)
    rows = [rng.integers(0, 16, n).astype(np.int32) for n in (3, 9, 4, 9, 5)]

    together = calibrate.measure_ranks(cfg, params, rows, mesh)

    alone = [calibrate.measure_ranks(cfg, params, [row], mesh) for row in rows]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert len(together) == sum(len(row) - 2 for row in rows)


def test_a_corpus_of_short_documents_is_calibrated(tmp_path, monkeypatch):
    lengths = list(np.random.default_rng(1).integers(2, 60, 99))
    corpus = corpus_of(tmp_path / "s", [*lengths, 300, 301, 302, 303])
    sizes = Corpus.open(corpus).documents("heldout").lengths.astype(int) - 2
    pieces = [min(256, n - b) for n in sizes for b in range(0, n, 256)]
    cfg = tiny(3, 4, vocab_size=256)
    data = DataConfig(sources=(corpus,))
    restored = Restored(
        Config(model=cfg, data=data),
        init(cfg, one_device()),
        one_device(),
        7,
        ByteTokenizer(),
    )

    result = calibrate.calibrate(restored, passages=1000, nodes=5)

    assert result.positions == sum(n - 2 for n in pieces if n >= 3)
