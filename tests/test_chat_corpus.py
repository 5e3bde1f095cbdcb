"""Corpora of conversations: whole in rows, with what is learned in every batch."""

import dataclasses
import itertools
import json
import pathlib
import re

import chats
import json_tokenizers
import numpy as np
import pytest
from corpora import S, T, assert_equal_batches, contents, make_corpus
from json_tokenizers import MARKED, byte_level
from test_data import make_config

from mtp_jax.cli import prepare as verb
from mtp_jax.data import batches
from mtp_jax.data.chat import encode_conversation
from mtp_jax.data.chat_template import template_of
from mtp_jax.data.conversations import conversation_of
from mtp_jax.data.corpus import Corpus, verify_files
from mtp_jax.data.order import document_order
from mtp_jax.data.prepare import prepare
from mtp_jax.data.whole_rows import WholeRows
from mtp_jax.errors import UserError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "Hello world"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and conversations of one to four rounds, the longest too long."""
    folder = tmp_path_factory.mktemp("chat")
    made = byte_level([chats.VOCABULARY], size=420)
    json_tokenizers.write(folder / "tokenizer", made, MARKED)
    records = [{"messages": messages} for messages in chats.drawn(120)]
    chats.write(folder / "chats.jsonl", records)
    return folder


def made_of(folder, name, source="chats.jsonl", **options):
    options = {"heldout": 0.2, "workers": 1, "format": "chat", **options}
    tokenizer = str(folder / "tokenizer")
    prepare(folder / source, folder / name, tokenizer=tokenizer, force=True, **options)
    return str(folder / name)


@pytest.fixture(scope="module")
def corpus(folder):
    return made_of(folder, "corpus")


def by_hand(corpus):
    """Ids and what is learned of each conversation, by its line."""
    lines = (pathlib.Path(corpus).parent / "chats.jsonl").read_text().splitlines()
    tokenizer = Corpus.open(corpus).tokenizer
    template = template_of(tokenizer)
    found = {}
    for number, line in enumerate(lines, 1):
        conversation = conversation_of(json.loads(line))[1]
        encoded = encode_conversation(conversation, tokenizer, template)
        key = f"chats.jsonl:{number}"
        found[key] = encoded.ids.tolist(), encoded.learned.tolist()
    return found


def test_the_corpus_has_every_conversation_and_what_is_learned_of_it(corpus):
    opened, expected = Corpus.open(corpus), by_hand(corpus)
    verify_files(opened)

    found = {}
    for split in ("train", "heldout"):
        documents = opened.documents(split)
        for i in range(len(documents)):
            parts = documents.tokens(i).tolist(), documents.learned(i).tolist()
            assert documents.learned(i, 2, 5).tolist() == parts[1][2:5]
            found[documents.name(i)] = parts
    assert found == expected
    assert opened.manifest["format"] == 3
    entry = opened.manifest["splits"]["train"]
    train = opened.documents("train")
    assert entry["learned"] == sum(
        int(train.learned(i).sum()) for i in range(len(train))
    )


def test_processes_and_shards_do_not_change_what_is_written(folder, corpus):
    records = (folder / "chats.jsonl").read_text() * 40
    (folder / "many.jsonl").write_text(records)
    one = made_of(folder, "one", "many.jsonl", shard_tokens=9000)
    two = made_of(folder, "two", "many.jsonl", shard_tokens=9000, workers=2)

    assert contents(pathlib.Path(one)) == contents(pathlib.Path(two))
    assert len(Corpus.open(one).manifest["splits"]["train"]["shards"]) > 3


@pytest.mark.parametrize("seed", [None, (0, 0), (0, 1)])
@pytest.mark.parametrize("t", [40, 100, 400])
def test_rows_hold_whole_conversations_each_once(corpus, t, seed):
    documents = Corpus.open(corpus).documents("train")
    lengths = documents.lengths.astype(int)
    rows = WholeRows(documents, t + 3, t, 500, seed)

    seen = []
    for r in range(len(rows)):
        row, at = rows[r], 0
        for segment, (i, begin, end) in enumerate(rows.pieces(r), 1):
            seen.append(i)
            assert begin == 0 and end == min(lengths[i], t + 3)
            assert end == lengths[i] or len(rows.pieces(r)) == 1
            slots = slice(at, at + end)
            expected = documents.tokens(i)[:end], documents.learned(i)[:end]
            assert row["tokens"][slots].tolist() == expected[0].tolist()
            assert row["learned"][slots].tolist() == expected[1].tolist()
            assert row["positions"][slots].tolist() == list(range(end))
            assert set(row["segments"][slots].tolist()) == {segment}
            at += end
        assert at <= t + 1 or len(rows.pieces(r)) == 1
        assert not any(row[key][at:].any() for key in row)
        assert all(x.dtype == np.int32 and len(x) == t + 3 for x in row.values())
    long = [i for i in range(len(documents)) if lengths[i] > t + 1]
    empty = [i for i in long if not documents.learned(i, 1, t + 3).any()]
    assert (rows.cut, rows.left_out) == (len(long), len(empty))
    assert sorted(seen) == sorted(set(range(len(documents))) - set(empty))


def test_rows_are_filled_as_best_fit_does_by_a_slow_search(corpus):
    documents = Corpus.open(corpus).documents("train")
    lengths = documents.lengths.astype(int)
    t, seed = 400, (3, 0)
    order = document_order(len(lengths), seed).tolist()
    expected = []
    for i in sorted(order, key=lambda i: -lengths[i]):
        free = [t + 1 - sum(lengths[j] for j in row) for row in expected]
        fitting = [(room, -k) for k, room in enumerate(free) if room >= lengths[i]]
        if fitting:
            best = min(room for room, _ in fitting)
            choices = [k for k, room in enumerate(free) if room == best]
            # Among rows with the same room any may be taken; compare their rooms.
            expected[choices[-1]].append(i)
        else:
            expected.append([i])

    rows = WholeRows(documents, t + 3, t, 500, seed)
    sizes = [sum(end for *_, end in rows.pieces(r)) for r in range(len(rows))]
    assert sorted(sizes) == sorted(sum(lengths[j] for j in row) for row in expected)
    assert len(rows) < 1.1 * sum(sizes) / (t + 1) + 1
    other = WholeRows(documents, t + 3, t, 500, (4, 0))
    assert [other.pieces(r) for r in range(5)] != [rows.pieces(r) for r in range(5)]


def config_of(sources, t=120, **fields):
    cfg = make_config(sources, **fields)
    data = dataclasses.replace(cfg.data, seq_len=t)
    model = dataclasses.replace(cfg.model, vocab_size=500)
    return dataclasses.replace(cfg, data=data, model=model)


def take(cfg, n, rows=None, start=0):
    rows = np.arange(cfg.data.batch_size) if rows is None else rows
    return list(itertools.islice(batches.train_batches(cfg, rows, start), n))


def test_batches_do_not_depend_on_how_many_hosts_share_them(corpus):
    cfg = config_of([corpus])
    whole = take(cfg, 5)
    halves = [take(cfg, 5, rows) for rows in (np.array([0, 3]), np.array([1, 2]))]

    for step, batch in enumerate(whole):
        assert batch.keys() == {"tokens", "segments", "positions", "learned", "hash"}
        for key, x in batch.items():
            assert np.array_equal(x[[0, 3]], halves[0][step][key])
            assert np.array_equal(x[[1, 2]], halves[1][step][key])
        assert 0 < batch["learned"].sum() < (batch["segments"] != 0).sum()
    again = take(cfg, 3, start=2)
    assert_equal_batches(again, whole[2:])
    threads = take(config_of([corpus], workers=2), 5)
    assert_equal_batches(threads, whole)


def test_an_epoch_of_batches_has_every_conversation_once(corpus):
    cfg = config_of([corpus])
    opened = [Corpus.open(corpus)]
    documents = opened[0].documents("train")
    rows = WholeRows(documents, cfg.row_len, cfg.data.seq_len, 500, (0, 0))
    epoch = (step for step in itertools.count())
    found, left = [], len(rows)
    while left > 0:
        pieces = batches.pieces_of_step(cfg, next(epoch), opened)
        found += [p.document for row in pieces[:left] for p in row]
        left -= len(pieces)
    assert len(found) == len(documents) - rows.left_out
    assert len(set(found)) == len(found)


def test_texts_among_conversations_are_learned_as_a_whole(folder, corpus):
    (folder / "text.txt").write_text("Hello world yes no " * 300)
    texts = made_of(
        folder, "texts", "text.txt", format="text", heldout=0, split_bytes=200
    )
    alone = take(config_of([texts]), 6)
    assert all("learned" not in batch for batch in alone)
    cfg = config_of([texts, corpus], weights=(1.0, 1.0))

    learned = [0, 0]
    for batch in take(cfg, 6):
        for row in range(len(batch["tokens"])):
            inside = batch["segments"][row] != 0
            whole = bool((batch["learned"][row] == inside).all())
            learned[whole] += 1
    assert min(learned) > 5
    [batch] = batches.heldout_batches(cfg, limit=1)
    assert batch["learned"].any()


def test_the_hash_of_a_row_sees_what_is_learned(corpus):
    from mtp_jax.data.packing import row_hash

    [batch] = take(config_of([corpus]), 1)
    row = {key: batch[key][0] for key in batch if key != "hash"}
    assert row_hash(row, 0).tolist() == batch["hash"][0].tolist()
    other = {**row, "learned": 1 - row["learned"]}
    assert row_hash(other, 0).tolist() != batch["hash"][0].tolist()


def test_corpora_of_texts_stay_what_they_were(tmp_path):
    corpus = Corpus.open(make_corpus(tmp_path / "c", ["abc" * 30] * 3, heldout=0))
    assert corpus.manifest["format"] == 1
    assert not {"chat", "format"} & corpus.manifest["options"].keys()
    names = {path.suffix for path in corpus.directory.iterdir()}
    assert names == {".json", ".tokens", ".offsets", ".names"}
    entry = corpus.manifest["splits"]["train"]
    assert list(entry) == ["documents", "tokens", "bytes", "shards"]
    assert S - T == 3


def run(folder, *options, source="bad.jsonl"):
    return verb.main(
        [f"--input={folder / source}", f"--output={folder / 'out'}", "--heldout=0",
         "--format=chat", f"--tokenizer={folder / 'tokenizer'}", "--workers=1",
         *options]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER]}, "has no message of the assistant, so there is nothing"),
        ({"text": "a"}, "is of no known form (it has text)"),
        ({"instruction": "q", "output": "a"}, "bad.jsonl:1 is of the form messages"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_left(folder, tmp_path, record, message):
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    chats.write(tmp_path / "bad.jsonl", [{"messages": [USER, ANSWER]}, record])
    with pytest.raises(UserError, match=re.escape(message)) as found:
        run(tmp_path)
    assert "bad.jsonl:2" in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_bad_lines_are_skipped_and_counted(folder, tmp_path, capsys):
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    records = [{"messages": [USER, ANSWER]}, {"messages": [USER]}, {"text": "a"}, [1]]
    chats.write(tmp_path / "bad.jsonl", records)
    assert run(tmp_path, "--skip_bad") == 0

    told = capsys.readouterr().out
    assert "1 not an object, 1 of no known form, 1 without an answer" in told
    assert re.search(r"train: 1 document, .* tokens to learn", told)


def test_turns_that_end_otherwise_than_texts_end_them_from_now_on(folder, capsys):
    chats.write(folder / "good.jsonl", [{"messages": [USER, ANSWER]}])
    assert run(folder, source="good.jsonl") == 0

    assert "turns end with <|turn|>" in capsys.readouterr().out
    tokenizer = Corpus.open(folder / "out").tokenizer
    assert [tokenizer.text_of(i) for i in tokenizer.end_ids] == ["<|end|>", "<|turn|>"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer=bytes"], "bytes has no chat template; give a tokenizer"),
        (["--chat_template=none.jinja"], "none.jinja cannot be read"),
        (["--split_bytes=100"], "are for texts; leave them out"),
        (["--text_field=talk"], "text_field, .* are for texts; leave them out"),
        (["--format=text", "--chat_form=alpaca"], "are for conversations"),
        (["--chat_form=alpaca"], "is not of the form alpaca"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, tmp_path, options, message):
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    chats.write(tmp_path / "bad.jsonl", [{"messages": [USER, ANSWER]}])
    with pytest.raises(UserError, match=message):
        run(tmp_path, *options)
    assert not (tmp_path / "out").exists()


def test_a_template_that_never_ends_a_turn_is_refused(folder, tmp_path):
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    chats.write(tmp_path / "bad.jsonl", [{"messages": [USER, ANSWER]}])
    (tmp_path / "t").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(UserError, match="no token after the answer that ends it"):
        run(tmp_path, f"--chat_template={tmp_path / 't'}")


def test_a_template_is_kept_with_the_bytes(tmp_path):
    chats.write(tmp_path / "c.jsonl", [{"messages": [USER, ANSWER]}])
    source = MARKED.replace("<|turn|>", "{{ eos_token }}")
    (tmp_path / "t.jinja").write_text(source)
    prepare(tmp_path / "c.jsonl", tmp_path / "out", format="chat", heldout=0,
            chat_template=tmp_path / "t.jinja", workers=1)  # fmt: skip
    assert Corpus.open(tmp_path / "out").tokenizer.chat_template == source


def test_text_files_hold_no_conversations(folder, tmp_path):
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt holds no conversations"):
        run(tmp_path, source="a.txt")


def test_a_row_too_short_for_any_answer_is_refused(corpus):
    documents = Corpus.open(corpus).documents("train")
    with pytest.raises(UserError, match="no conversation has an answer within its"):
        WholeRows(documents, 5, 2, 500, None)


def test_conversations_longer_than_a_row_are_told(corpus, tmp_path):
    opened = Corpus.open(corpus)
    lengths = opened.documents("train").lengths
    cfg = config_of([corpus], t=100)
    [line] = batches.cut_conversations(cfg, [opened])
    assert f"{(lengths > 101).sum()} of {len(lengths)} conversations" in line
    assert batches.cut_conversations(config_of([corpus], t=4000), [opened]) == []
    texts = Corpus.open(make_corpus(tmp_path / "c", ["a" * 900] * 3, heldout=0))
    assert batches.cut_conversations(cfg, [texts]) == []
