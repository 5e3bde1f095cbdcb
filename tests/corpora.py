"""Small corpora, and their rows by the definition written with loops."""

import json

import numpy as np

from mtp_jax.cli import prepare as verb
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prepare import prepare

T, N = 16, 3
S = T + N


def make_corpus(folder, texts, **options):
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines)
    prepare(folder / "texts.jsonl", folder / "corpus", workers=1, **options)
    return str(folder / "corpus")


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def stream_by_hand(documents, order):
    """(token, number of document) of all documents in this order."""
    stream = []
    for number in order:
        stream += [(int(token), number) for token in documents.tokens(int(number))]
    return stream


def row_by_hand(stream, start):
    """tokens, segments and positions of the row that starts here."""
    tokens, segments, positions = [], [], []
    for at in range(start, start + S):
        if at >= len(stream):
            tokens.append(0), segments.append(0), positions.append(0)
            continue
        token, number = stream[at]
        same = at > start and stream[at - 1][1] == number
        tokens.append(token)
        segments.append((segments[-1] if segments else 0) + (not same))
        positions.append(positions[-1] + 1 if same else 0)
    return {"tokens": tokens, "segments": segments, "positions": positions}


def run(source, output, *options):
    """The corpus that the verb `prepare` makes."""
    argv = [f"--input={source}", f"--output={output}", "--workers=1", *options]
    assert verb.main(argv) == 0
    return Corpus.open(output)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
