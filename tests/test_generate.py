"""The verb `generate`, on a model that was never trained."""

import functools
import io
import json
import sys
import types

import jax
import numpy as np
import pytest
from models import mesh_of

from mtp_jax import generate
from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.corpus import Corpus
from mtp_jax.errors import UserError
from mtp_jax.tokenizer import ByteTokenizer
from mtp_jax.train_step import model_builder

FEW = "--max_new_tokens=6"


@functools.cache
def trained():
    """What `restore_model` would give."""
    mesh = mesh_of()
    model = ModelConfig(
        d_model=16,
        num_layers=3,
        n_future_tokens=2,
        num_query_heads=2,
        num_kv_heads=2,
        d_head=8,
        d_ff=32,
    )
    with jax.set_mesh(mesh):
        params = jax.jit(model_builder(model)[0])(jax.random.key(0))
    return model, params, mesh


@pytest.fixture
def restored(monkeypatch):
    """Takes the place of a checkpoint; records how it was asked for."""
    asked = []
    model, params, mesh = trained()

    def restore_model(workdir, *, step=None, heads=None):
        asked.append((workdir, step, heads))
        config = Config(model=model, data=DataConfig(sources=("corpus",)))
        return types.SimpleNamespace(
            config=config, params=params, mesh=mesh, step=7, tokenizer=ByteTokenizer()
        )

    stand_in = types.ModuleType("mtp_jax.restore")
    stand_in.restore_model = restore_model
    monkeypatch.setitem(sys.modules, "mtp_jax.restore", stand_in)
    monkeypatch.setattr("mtp_jax.restore", stand_in, raising=False)
    return asked


def test_a_prompt_is_continued(restored, capsys):
    assert generate.main(["--workdir=run", "--step=3", "--prompt=abc", FEW]) == 0
    text = capsys.readouterr().out
    assert text.startswith("abc")
    assert text.splitlines()[-1].startswith("blockwise: 1 texts, ")
    assert restored == [("run", 3, None)]


def test_json_is_an_object_a_prompt_and_nothing_else(restored, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\u2028b"}\n\n{"prompt": ""}\n', encoding="utf-8")
    generate.main(["--workdir=run", f"--prompts={file}", "--json", FEW])
    results = [json.loads(s) for s in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in results] == ["a\u2028b", ""]
    assert set(results[0]) == {
        "prompt",
        "text",
        "tokens",
        "forwards",
        "tokens_per_forward",
        "accepted_by_head",
        "tokens_per_s",
        "finish",
    }


def test_prompts_come_a_line_each_from_files_and_standard_input(
    restored, capsys, tmp_path, monkeypatch
):
    content = "one\u2028still one\n\ntwo\n".encode()
    (tmp_path / "prompts.txt").write_bytes(content)
    stdin = types.SimpleNamespace(buffer=io.BytesIO(content))
    monkeypatch.setattr("sys.stdin", stdin)
    for source in (tmp_path / "prompts.txt", "-"):
        generate.main(["--workdir=run", f"--prompts={source}", "--json", FEW])
        lines = capsys.readouterr().out.splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        assert prompts == ["one\u2028still one", "", "two"]


def test_plain_alone_restores_one_head(restored, capsys):
    generate.main(["--workdir=run", "--prompt=a", "--decoder=plain", FEW])
    assert restored == [("run", None, 1)]


def test_compare_prints_every_decoder_and_finds_them_equal(restored, capsys):
    assert generate.main(["--workdir=run", "--prompt=ab", "--compare", FEW]) == 0
    header, plain, blockwise = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["decoder", "forwards", "tokens/forward"]
    assert plain.split()[:3] == ["plain", "6", "1.00"]
    assert plain.endswith("1 of 1") and blockwise.endswith("1 of 1")


def test_compare_fails_if_a_text_differs(restored, capsys, monkeypatch):
    from mtp_jax.decode import Generation, Generator

    def differing(self, prompts, *, decoder, **_):
        return [Generation("a", decoder, [1], 1, 1.0, [], 1.0, "length")]

    monkeypatch.setattr(Generator, "generate", differing)
    assert generate.main(["--workdir=run", "--prompt=a", "--compare"]) == 1
    assert capsys.readouterr().out.endswith("0 of 1\n")


def test_stop_texts_may_hold_escapes():
    assert generate._unescape(r"a\n\tb\\n") == "a\n\tb\\n"


class FakeDocuments:
    """Documents whose tokens count up from 1000 x their number."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, np.uint64)

    def tokens(self, i, start=0, stop=None):
        return np.arange(self.lengths[i], dtype=np.int64)[start:stop] + 1000 * i


@pytest.fixture
def corpus(monkeypatch):
    documents = FakeDocuments([50, 5, 102, 12, 70, 3])
    opened = types.SimpleNamespace(documents=lambda split: documents)
    monkeypatch.setattr(Corpus, "open", lambda directory: opened)


def test_heldout_prompts_lie_inside_documents_that_are_long_enough(corpus):
    prompts = generate.heldout_prompts(["a"], 3, prompt_tokens=10)
    assert [int(p[0]) // 1000 for p in prompts] == [0, 2, 3]
    assert all(len(p) == 10 for p in prompts)
    assert [int(p[0]) % 1000 for p in prompts] == [20, 46, 1]


def test_heldout_documents_that_serve_twice_are_cut_at_two_places(corpus):
    prompts = generate.heldout_prompts(["a"], 4, prompt_tokens=60)
    assert [int(p[0]) // 1000 for p in prompts] == [2, 2, 4, 4]
    assert len({int(p[0]) for p in prompts}) == 4


def test_heldout_prompts_are_continued(restored, corpus, capsys, monkeypatch):
    documents = FakeDocuments([90])
    opened = types.SimpleNamespace(documents=lambda split: documents)
    monkeypatch.setattr(Corpus, "open", lambda directory: opened)
    args = ["--workdir=run", "--heldout=2", "--prompt_tokens=3", "--json", FEW]
    assert generate.main(args) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_too_long_heldout_prompts_are_refused(corpus):
    with pytest.raises(UserError, match="longest has 100"):
        generate.heldout_prompts(["a"], 1, prompt_tokens=101)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens"),
        (["--prompt=a", "--decoder=magic"], "plain, blockwise"),
        (["--prompt=a", "--heads=0"], "heads"),
        (["--prompt=a", "--heads=9"], "heads 1 to 2"),
        (["--prompt=a", "--heldout=2"], "not allowed with"),
        (["--prompt=a", "--compare", "--json"], "not allowed with"),
        (["--prompt=a", "--stop="], "--stop is empty"),
        ([], "required"),
        (["--prompts=nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_bad_flags_are_refused(restored, flags, message):
    with pytest.raises(UserError, match=message):
        generate.main(["--workdir=run", *flags])


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("latin.txt", b"caf\xe9\n", r"not UTF-8 \(byte 3\)"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": 1}\n', "line 2"),
        ("bad.jsonl", b"nonsense\n", "line 1"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        generate.main(["--workdir=run", f"--prompts={tmp_path / name}"])
