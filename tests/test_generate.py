"""The verb `generate`, on a model that was never trained."""

import functools
import io
import json
import types

import jax
import numpy as np
import pytest
from models import mesh_of

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.cli import generate
from mtp_jax.cli.args import unescape
from mtp_jax.config import Config, DataConfig, ModelConfig
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.prompts import heldout_prompts
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.decode.fitting import fitting
from mtp_jax.decode.generation import Generation, totals
from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError
from mtp_jax.model.language_model import model_builder

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
        config = Config(model=model, data=DataConfig(sources=("corpus",), seq_len=40))
        if workdir == "one head":
            config = config.keep_heads(1)
        return Restored(config, params, mesh, 7, ByteTokenizer())

    monkeypatch.setattr("mtp_jax.checkpoint.restore.restore_model", restore_model)
    return asked


def test_a_prompt_is_continued(restored, capsys):
    assert generate.main(["--workdir=run", "--step=3", "--prompt=abc", FEW]) == 0
    text = capsys.readouterr().out
    assert text.startswith("abc")
    assert text.splitlines()[-1].startswith("blockwise: 1 text, ")
    assert restored == [("run", 3, None)]


def test_json_is_an_object_a_prompt_and_nothing_else(restored, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\u2028b"}\n\n{"prompt": "c"}\n', encoding="utf-8")
    generate.main(["--workdir=run", f"--prompts={file}", "--json", FEW])
    results = [json.loads(s) for s in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in results] == ["a\u2028b", "c"]
    assert set(results[0]) == {
        "prompt",
        "text",
        "tokens",
        "heads",
        "passes",
        "forwards",
        "tokens_per_forward",
        "accepted_by_head",
        "tokens_per_s",
        "finish",
        "deviations",
        "prompt_tokens",
        "ended_by",
    }


def test_prompts_come_a_line_each_from_files_and_standard_input(
    restored, capsys, tmp_path, monkeypatch
):
    content = "one\u2028still one\ntwo\n".encode()
    (tmp_path / "prompts.txt").write_bytes(content)
    stdin = types.SimpleNamespace(buffer=io.BytesIO(content))
    monkeypatch.setattr("sys.stdin", stdin)
    for source in (tmp_path / "prompts.txt", "-"):
        generate.main(["--workdir=run", f"--prompts={source}", "--json", FEW])
        lines = capsys.readouterr().out.splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        assert prompts == ["one\u2028still one", "two"]


@pytest.mark.parametrize("decoder", ["blockwise", "speculative"])
def test_one_head_cannot_draft(restored, monkeypatch, decoder):
    monkeypatch.setattr("mtp_jax.decode.generator.unstack", None)
    with pytest.raises(UserError, match="the model has 1: use plain"):
        generate.main(["--workdir=one head", "--prompt=a", f"--decoder={decoder}"])


def test_one_head_is_decoded_by_plain(restored, capsys):
    generate.main(["--workdir=one head", "--prompt=a", FEW])
    assert capsys.readouterr().out.splitlines()[-1].startswith("plain: 1 text, ")


def test_going_on_beyond_what_was_trained_is_said(restored, capsys):
    generate.main(["--workdir=run", "--prompt=a", FEW])
    assert capsys.readouterr().err == ""
    generate.main(["--workdir=run", "--prompt=a", "--max_new_tokens=40"])
    assert "trained on rows of 40" in capsys.readouterr().err


def test_plain_alone_keeps_one_head(restored, capsys, monkeypatch):
    made = []
    of = Generator.from_restored
    monkeypatch.setattr(
        Generator, "from_restored", lambda x: made.append(x.config.model) or of(x)
    )

    generate.main(["--workdir=run", "--prompt=a", "--decoder=plain", FEW])
    generate.main(["--workdir=run", "--prompt=a", FEW])

    assert [model.n_future_tokens for model in made] == [1, 2]


def test_compare_takes_a_decoder_with_its_options(restored, capsys):
    spec = "dynamo:alpha=0,threshold=0.5"

    generate.main(
        ["--workdir=run", "--prompt=ab", "--compare", f"--decoder={spec}", FEW]
    )

    out = capsys.readouterr().out
    assert f"\n{spec} " in out
    assert "left out: dynamo_exact" in out and "left out: dynamo " not in out


def test_compare_prints_every_decoder_and_finds_them_equal(restored, capsys):
    assert generate.main(["--workdir=run", "--prompt=ab", "--compare", FEW]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["decoder", "kind", "forwards", "tokens/forward"]
    rows = {line.split()[0]: line for line in lines}
    assert rows["plain"].split()[:4] == ["plain", "exact", "6", "1.00"]
    for name, decoder in fitting(ModelConfig(n_future_tokens=2)).items():
        if isinstance(decoder, str):
            assert f"left out: {name}" in "\n".join(lines)
        elif not decoder.lossy:
            assert "1 of 1" in rows[name]


def test_compare_of_samples_leaves_out_what_needs_heads(restored, capsys):
    args = ["--workdir=one head", "--prompt=ab", "--temperature=1", "--compare", FEW]
    assert generate.main(args) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["plain"].split()[-1] == "-"
    assert "blockwise" not in rows


def made(text, **changes):
    values = {
        "prompt": "a",
        "text": text,
        "tokens": [1],
        "heads": [1],
        "passes": [0],
        "forwards": 1,
        "tokens_per_forward": 1.0,
        "accepted_by_head": [],
        "tokens_per_s": 1.0,
        "finish": "length",
    }
    return Generation(**{**values, **changes})


def test_compare_fails_if_a_text_differs(restored, capsys, monkeypatch):
    def differing(self, prompts, *, decoder, **_):
        return [made(type(decoder).__name__)]

    monkeypatch.setattr(Generator, "generate", differing)
    assert generate.main(["--workdir=run", "--prompt=a", "--compare"]) == 1
    assert "0 of 1" in capsys.readouterr().out


def test_totals_weigh_texts_by_their_work():
    # Two batches: 6 tokens in 2 s, and 4 in 1 s.
    one = made("", forwards=3, tokens_per_forward=2.0, accepted_by_head=[0.5, 0.0],
               tokens_per_s=3.0)  # fmt: skip
    two = made("", forwards=2, tokens_per_forward=2.0, accepted_by_head=[1.0, 1.0],
               tokens_per_s=4.0)  # fmt: skip
    figures = totals([one, two])
    assert (figures.forwards, figures.tokens, figures.seconds) == (5, 10.0, 3.0)
    np.testing.assert_allclose(figures.accepted_by_head, [2 / 3, 1 / 3])


def test_a_stream_prints_what_is_printed_otherwise(restored, capsys):
    args = ["--workdir=run", "--prompt=abc", "--max_new_tokens=30", r"--stop=\n\n"]
    generate.main(args)
    whole = capsys.readouterr().out
    generate.main([*args, "--stream", "--batch_size=1"])
    streamed = capsys.readouterr().out
    assert streamed.splitlines()[:-1] == whole.splitlines()[:-1]  # the last has times


def test_colours_and_the_page_are_of_the_same_text(restored, capsys, tmp_path):
    file = tmp_path / "page.html"
    args = ["--workdir=run", "--prompt=<b>", f"--html={file}", FEW]
    generate.main([*args, "--color=always"])
    coloured = capsys.readouterr().out
    generate.main(args)
    plain = capsys.readouterr().out
    assert f"{file}: a page of" in coloured and f"{file}: a page of" in plain
    assert "head 1: " in coloured and "\x1b" not in plain, "not a terminal: no colour"
    page = file.read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and page.count("data-note=") > 1


def lines_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def test_a_batch_goes_on_where_it_was_ended(restored, capsys, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nab\nb\nc\n")
    args = ["--workdir=run", f"--prompts={prompts}", "--batch_size=2", FEW]
    args += ["--temperature=1", "--seed=3"]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    generate.main([*args, f"--output={whole}"])
    expected = lines_of(whole)
    assert [row["prompt"] for row in expected] == ["a", "b", "ab", "b", "c"]
    assert expected[1]["tokens"] != expected[3]["tokens"], "draws of their own"

    content = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(content[:3]) + content[3][:40])
    asked = []
    original = Generator.generate

    def counting(self, prompts, **settings):
        asked.extend(prompts)
        return original(self, prompts, **settings)

    monkeypatch.setattr(Generator, "generate", counting)
    for _ in range(2):  # the second time there is nothing left to do
        assert generate.main([*args, f"--output={part}"]) == 0
        assert asked == ["b", "c"]
        assert lines_of(part) == expected
    assert capsys.readouterr().out.endswith("5 of them there already\n")

    for changed, message in [
        (["--seed=4"], "begun with another sampling"),
        (["--decoder=plain"], "another decoder"),
    ]:
        with pytest.raises(UserError, match=message):
            generate.main([*args, f"--output={part}", *changed])
    prompts.write_text("a\nz\n")
    with pytest.raises(UserError, match="line 2 is of another prompt"):
        generate.main([*args, f"--output={part}"])
    part.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1 is not one of this program"):
        generate.main([*args, f"--output={part}"])


def test_stop_texts_may_hold_escapes():
    assert unescape(r"a\n\tb\\n") == "a\n\tb\\n"


class FakeDocuments:
    """Documents whose tokens count up from 1000 x their number."""

    def __init__(self, lengths):
        self.sampled_lengths = np.array(lengths, np.uint64)

    def tokens(self, i, start=0, stop=None):
        return np.arange(self.sampled_lengths[i], dtype=np.int64)[start:stop] + 1000 * i


@pytest.fixture
def corpus(monkeypatch):
    documents = FakeDocuments([50, 5, 102, 12, 70, 3])
    opened = types.SimpleNamespace(documents=lambda split: documents)
    monkeypatch.setattr(Corpus, "open", lambda directory: opened)


def test_heldout_prompts_lie_inside_documents_that_are_long_enough(corpus):
    prompts = heldout_prompts(["a"], 3, prompt_tokens=10)
    assert [int(p[0]) // 1000 for p in prompts] == [0, 2, 3]
    assert all(len(p) == 10 for p in prompts)
    assert [int(p[0]) % 1000 for p in prompts] == [20, 46, 1]


def test_heldout_documents_that_serve_twice_are_cut_at_two_places(corpus):
    prompts = heldout_prompts(["a"], 4, prompt_tokens=60)
    assert [int(p[0]) // 1000 for p in prompts] == [2, 2, 4, 4]
    assert len({int(p[0]) for p in prompts}) == 4


def test_heldout_prompts_are_continued(restored, corpus, capsys, monkeypatch):
    documents = FakeDocuments([90])
    opened = types.SimpleNamespace(documents=lambda split: documents)
    monkeypatch.setattr(Corpus, "open", lambda directory: opened)
    args = ["--workdir=run", "--heldout=2", "--prompt_tokens=3", "--json", FEW]
    assert generate.main(args) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_more_heldout_prompts_than_there_are_are_refused(corpus):
    with pytest.raises(UserError, match=r"\d+ beginnings of 10 tokens, and 1000000000"):
        heldout_prompts(["a"], 10**9, prompt_tokens=10)


def test_too_long_heldout_prompts_are_refused(corpus):
    with pytest.raises(UserError, match="longest has 100"):
        heldout_prompts(["a"], 1, prompt_tokens=101)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--prompt=a", "--max_new_tokens=0"], "max_new_tokens"),
        (["--prompt=a", "--decoder=magic"], "plain, blockwise"),
        (["--prompt=a", "--heads=0"], "heads"),
        (["--prompt=a", "--heldout=2"], "not allowed with"),
        (["--prompt=a", "--compare", "--json"], "not allowed with"),
        (["--prompt=a", "--compare", "--html=x"], "not allowed with"),
        (["--prompt=a", "--html=/nowhere/x"], "--html=/nowhere/x is no file"),
        (["--prompt=a", "--stream", "--color=always"], "--color=always is not allowed"),
        (["--prompt=a", "--decoder=plain", "--adaptive"], "exact decoders that draft"),
        (
            ["--prompt=a", "--decoder=typical", "--adaptive"],
            "exact decoders that draft",
        ),
        (["--prompt=a", "--decoder=tree:tree=x"], "x cannot be read"),
        (["--prompt="], "--prompt is empty"),
        (["--prompt=a", "--temperature=-1"], "temperature is -1"),
        (["--prompt=a", "--top_p=0"], "top_p is 0"),
        (["--prompt=a", "--top_p=1.5"], "top_p is 1.5"),
        (["--prompt=a", "--top_k=-1"], "top_k is -1"),
        (["--prompt=a", "--repetition_penalty=0"], "repetition_penalty is 0"),
        (["--prompt=a", "--wide=3"], "unknown option --wide"),
        (["--prompt=a", "--decoder=plain", "--wide=3"], "--decoder=plain are none"),
        (["--heldout=2", "--stream"], "give one prompt"),
        (["--prompt=" + "a" * 40], r"has 41 tokens.*at most 40"),
        (["--prompt=abc", "--max_prompt_tokens=3"], r"has 4 tokens.*at most 3"),
        (["--prompt=a", "--output=/nowhere/x"], "--output=/nowhere/x cannot be used"),
        (["--prompt=a", "--stop="], "--stop is empty"),
        ([], "required"),
        (["--prompts=nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_bad_flags_are_refused(restored, monkeypatch, flags, message):
    monkeypatch.setattr(
        "mtp_jax.decode.generator.unstack", None
    )  # nothing is compiled before
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
        ("gap.txt", b"a\n\nb\n", "prompt 2 of .*gap.txt is empty"),
        ("gap.jsonl", b'{"prompt": ""}\n', "prompt 1 of .*gap.jsonl is empty"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        generate.main(["--workdir=run", f"--prompts={tmp_path / name}"])
