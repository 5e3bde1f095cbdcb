"""Runs on conversations: they learn the answers alone, on any number of hosts."""

import dataclasses
import json

import chats
import json_tokenizers
import numpy as np
import pytest
from json_tokenizers import MARKED, byte_level
from runs import (
    TINY_FILE,
    audited,
    complete,
    complete_hosts,
    hashes,
    losses,
    mesh_options,
    records,
    train_args,
)
from test_chat_corpus import config_of

from mtp_jax.cli import evaluate, train
from mtp_jax.data import batches
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prepare import prepare


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    made = byte_level([chats.VOCABULARY], size=420)
    tokenizer = json_tokenizers.write(folder / "tokenizer", made, MARKED)
    records = [{"messages": messages} for messages in chats.drawn(120)]
    chats.write(folder / "chats.jsonl", records)
    prepare(folder / "chats.jsonl", folder / "corpus", tokenizer=tokenizer,
            format="chat", heldout=0.2, workers=1)  # fmt: skip
    return str(folder / "corpus")


def test_a_run_on_conversations_trains_and_measures_what_is_learned(
    corpus, tmp_path, capsys
):
    """From the corpus to a checkpoint, and an evaluation of its answers alone."""
    arguments = [
        f"--config={TINY_FILE}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.sources={corpus}", "--config.model.vocab_size=500",
        "--config.data.seq_len=100", "--config.train.steps=2",
        "--config.eval.every=0", "--config.log.every=1",
        "--config.log.tensorboard=False", "--config.checkpoint.every=2",
    ]  # fmt: skip
    assert train.main(arguments) == 0
    assert "their ends are left out" in capsys.readouterr().out
    assert evaluate.main([f"--workdir={tmp_path / 'run'}"]) == 0

    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    cfg = config_of([corpus], t=100)
    model = dataclasses.replace(cfg.model, n_future_tokens=3)
    data = dataclasses.replace(cfg.data, batch_size=8)
    cfg = dataclasses.replace(cfg, model=model, data=data)
    tokenizer = Corpus.open(corpus).tokenizer
    sizes, tokens, size = tokenizer.piece_bytes(), 0, 0
    for batch in batches.heldout_batches(cfg):
        for row in range(len(batch["tokens"])):
            for t in range(100):
                here, there = batch["segments"][row, t : t + 2]
                if here and here == there and batch["learned"][row, t + 1]:
                    tokens += 1
                    size += sizes[batch["tokens"][row, t + 1]]
    assert (figures["tokens"], figures["bytes"]) == (tokens, size)
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == MARKED


@pytest.mark.slow
def test_two_hosts_learn_what_one_does(corpus, tmp_path):
    def options(name):
        return train_args(
            tmp_path / name,
            corpus,
            "--config.train.steps=4",
            "--config.model.vocab_size=500",
            "--config.data.seq_len=120",
            *mesh_options((1, 2, 1, 1)),
        )

    complete(options("one"), devices=2)
    complete_hosts(options("two"), 2)

    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    counts = [[row["tokens"] for row in records(tmp_path / n)] for n in ("one", "two")]
    assert counts[0] == counts[1] and max(counts[0]) < 8 * 120 / 2
    assert audited(tmp_path / "two")["steps"] == 4
