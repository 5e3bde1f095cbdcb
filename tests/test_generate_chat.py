"""`generate --chat`: prompts by the chat template, and answers that can be learned."""

import dataclasses
import json

import chats
import jax
import json_tokenizers
import numpy as np
import pytest
from json_tokenizers import BEGIN, MARKED, TURN, byte_level
from models import mesh_of
from test_generate import trained

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.cli import generate
from mtp_jax.config import Config, DataConfig
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prepare import prepare
from mtp_jax.data.tokenizer import load_tokenizer
from mtp_jax.decode.generator import Generator
from mtp_jax.decode.prompt_list import WholePrompt
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder

FEW = "--max_new_tokens=6"
SPARE = 20  # ids of the model that the tokenizer does not have


@pytest.fixture(scope="module")
def made():
    return byte_level([chats.VOCABULARY])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = json_tokenizers.write(folder, made, MARKED)
    stops = {"eos_token_id": [made.token_to_id(TURN)]}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    return tokenizer


@pytest.fixture
def restored(monkeypatch, folder):
    """Takes the place of a checkpoint, of a model with ids to spare."""
    tokenizer = load_tokenizer(folder)
    model, _, mesh = trained()
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size + SPARE)
    with jax.set_mesh(mesh_of()):
        params = jax.jit(model_builder(model)[0])(jax.random.key(0))
    config = Config(model=model, data=DataConfig(sources=("corpus",), seq_len=200))
    found = Restored(config, params, mesh, 7, tokenizer)
    monkeypatch.setattr(
        "mtp_jax.checkpoint.restore.restore_model", lambda *_, **__: found
    )
    return found


def answers(capsys, *options):
    assert generate.main(["--workdir=run", "--chat", "--json", FEW, *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_prompt_is_what_a_user_says(restored, made, capsys):
    [row] = answers(capsys, "--prompt=Hello world", "--system=yes")

    text = f"{BEGIN}<system>\nyes{TURN}\n<user>\nHello world{TURN}\n<assistant>\n"
    assert row["prompt_tokens"] == made.encode(text, add_special_tokens=False).ids
    assert row["messages"] == [
        {"role": "system", "content": "yes"},
        {"role": "user", "content": "Hello world"},
        {"role": "assistant", "content": row["text"]},
    ]
    assert row["text"] == restored.tokenizer.decode(row["tokens"])


def test_prompts_of_a_file_are_conversations(restored, made, capsys, tmp_path):
    path = tmp_path / "asked.jsonl"
    asked = chats.drawn(3, seed=7)
    chats.write(path, [{"messages": messages} for messages in asked])
    found = answers(capsys, f"--prompts={path}")

    for row, messages in zip(found, asked, strict=True):
        whole, _ = chats.expected(messages, made, restored.tokenizer)
        n = len(row["prompt_tokens"])
        assert row["prompt_tokens"] == whole[:n] and n < len(whole)
        assert row["messages"][:-1] == messages[:-1]
    (tmp_path / "lines.txt").write_text("hi\nyes no\n")
    found = answers(capsys, f"--prompts={tmp_path / 'lines.txt'}")
    assert [row["messages"][0]["content"] for row in found] == ["hi", "yes no"]


def test_sampled_answers_are_data_to_learn_from(restored, folder, tmp_path, capsys):
    path, output = tmp_path / "asked.jsonl", tmp_path / "said.jsonl"
    asked = [{"messages": messages} for messages in chats.drawn(20, seed=8)]
    chats.write(path, asked)
    options = ["--workdir=run", "--chat", f"--prompts={path}", f"--output={output}",
               "--temperature=1", "--max_new_tokens=40"]  # fmt: skip
    assert generate.main(options) == 0
    assert generate.main(options) == 0  # goes on from there
    assert "20 of them there already" in capsys.readouterr().out

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    prepare(output, tmp_path / "corpus", tokenizer=folder, format="chat", heldout=0,
            skip_bad=True, workers=1)  # fmt: skip
    corpus = Corpus.open(tmp_path / "corpus")
    documents = corpus.documents("train")
    left = sum(corpus.manifest["skipped_bad"].values())
    assert len(documents) + left == 20 and left < 10
    for i in range(len(documents)):
        row = rows[int(documents.name(i).rpartition(":")[2]) - 1]
        ids, learned = documents.tokens(i), documents.learned(i) == 1
        n = len(row["prompt_tokens"])
        assert ids[:n].tolist() == row["prompt_tokens"]
        assert learned[n:].all()
        text = corpus.tokenizer.decode(ids[n:])
        if row["finish"] == "length":
            assert row["text"].startswith(text) and text
        else:
            assert text.removesuffix("\n") == row["text"]
            assert corpus.tokenizer.end_ids[0] in ids[n:] or TURN in [
                corpus.tokenizer.text_of(int(j)) for j in ids[n:]
            ]


def test_spare_ids_are_never_written(restored):
    generator = Generator.from_restored(restored)
    from mtp_jax.decode.decoders.sampling import Sampling

    results = generator.generate(
        ["Hello"] * 8, max_new_tokens=64, sampling=Sampling(temperature=5.0, seed=1)
    )
    tokens = [token for result in results for token in result.tokens]
    assert len(tokens) > 300 and max(tokens) < restored.tokenizer.vocab_size


def test_what_begins_a_prompt_is_put_there_once(folder, made, restored):
    begin = made.token_to_id(BEGIN)
    framed = json_tokenizers.loaded(
        json_tokenizers.with_begin(byte_level([chats.VOCABULARY]))
    )
    plain = Generator.from_restored(restored)
    with_begin = Generator.from_restored(
        dataclasses.replace(restored, tokenizer=framed)
    )
    ids = framed.encode("Hello")

    assert plain.prompt_length("Hello") == len(ids)
    assert with_begin.prompt_length("Hello") == 1 + len(ids)
    assert with_begin.prompt_length(f"{BEGIN}Hello") == 1 + len(ids)
    assert with_begin.prompt_length(ids) == 1 + len(ids)
    assert with_begin.prompt_length(WholePrompt(ids)) == len(ids)
    assert plain.prompt_length(np.zeros(0, np.int32)) == 1
    assert begin == framed.bos_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat", "--heldout=2"], "--chat is not allowed with --heldout"),
        (["--prompt=a", "--system=b"], "are for --chat"),
        (["--chat", "--prompt=a", "--chat_template=none"], "none cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(restored, options, message):
    with pytest.raises(UserError, match=message):
        generate.main(["--workdir=run", FEW, *options])


def test_files_without_questions_are_refused(restored, tmp_path):
    for number, (line, message) in enumerate(
        [
            ("[1]", "is not JSON's object"),
            ('{"a": 1}', "has no messages and no prompt"),
            (
                '{"messages": [{"role": "assistant", "content": "x"}]}',
                "no message to ans",
            ),
            ("", "is empty"),
        ]
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=message):
            generate.main(["--workdir=run", "--chat", f"--prompts={path}", FEW])


def test_a_tokenizer_without_a_template_is_told(restored, monkeypatch, made):
    other = dataclasses.replace(restored, tokenizer=json_tokenizers.loaded(made))
    monkeypatch.setattr(
        "mtp_jax.checkpoint.restore.restore_model", lambda *_, **__: other
    )
    with pytest.raises(UserError, match="has no chat template"):
        generate.main(["--workdir=run", "--chat", "--prompt=hi", FEW])
