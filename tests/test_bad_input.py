"""Bad input: one clear line, exit code 2, no traceback, nothing begun, nothing left."""

import dataclasses
import json
import shutil
import sys

import pytest
from runs import ROOT

from mtp_jax import __main__
from mtp_jax.cli import prepare as prepare_verb
from mtp_jax.cli.args import config_from
from mtp_jax.data.prepare import prepare

TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs the command line in this process; a run that gets past the checks fails."""

    def passed(*args, **kwargs):
        raise AssertionError("the checks let it through")

    monkeypatch.setattr("mtp_jax.run.train.run", passed)
    monkeypatch.setattr("mtp_jax.run.train._start_jax", lambda *run: None)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mtp-jax", *map(str, args)])
        sys.modules.pop("config_config", None)  # the config file of the test before
        code = __main__.main()
        return code, capsys.readouterr().err

    return run


def assert_refused(result, *words):
    code, err = result
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert err.startswith("mtp-jax: error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.d_modle=3", ["d_modle", "d_model"]),
        ("heads.kind=medusa", ["config.heads.kind is 'medusa'", "serial"]),
        ("heads.layers=0", ["config.heads.layers is 0", "at least 1"]),
        ("heads.layers=2", ["3, more than config.model.num_layers (4)", "at most 2"]),
        ("heads.shared=True", ["all parallel heads say the same", "causal"]),
        ("heads.concat=embedding_first", ["only serial heads", "kind=serial"]),
        ("heads.markov_rank=257", ["config.heads.markov_rank is 257", "(256)"]),
        ("heads.markov_rank=-1", ["config.heads.markov_rank is -1"]),
        ("heads.rank=3", ["config.heads has no field 'rank'"]),
        ("modle.d_model=3", ["modle"]),
        ("compute.rematt=full", ["'rematt'", "did you mean config.compute.remat?"]),
        ("mesh.data=2", ["config.mesh has no field 'data'"]),
        ("compute.chunk_tokens=1.5", ["chunk_tokens=1.5: must be a whole number"]),
        ("mesh.tensor=3", ["the axes beside the one of -1 come to 3"]),
        ("compute=full", ["--config.compute=full: this is a section"]),
        ("compute.remat=most", ["config.compute.remat is 'most'", "offload"]),
        ("compute.head_loss=fast", ["config.compute.head_loss is 'fast'", "naive"]),
        ("compute.chunk_tokens=-1", ["config.compute.chunk_tokens is -1"]),
        ("model.d_model=wide", ["config.model.d_model", "wide"]),
        (
            "model.n_future_tokens=0",
            ["config.model.n_future_tokens is 0", "at least 1"],
        ),
        ("model.n_future_tokens=-2", ["config.model.n_future_tokens is -2"]),
        ("model.n_future_tokens=5", ["more than", "num_layers (4)"]),
        (
            "model.num_layers=3",
            ["config.model.num_layers is 3, and heads take them all", "give 4 or more"],
        ),
        ("model.d_head=15", ["d_head is 15"]),
        ("model.num_query_heads=5", ["num_query_heads (5)"]),
        ("model.num_kv_heads=3", ["num_query_heads (4)", "num_kv_heads (3)"]),
        ("model.vocab_size=200", ["vocabulary", "256", "200"]),
        ("model.compute_dtype=float8", ["compute_dtype", "bfloat16"]),
        ("mesh.fsdp=16", ["config.mesh", "8 devices"]),
        ("mesh.replica=0", ["config.mesh.replica is 0"]),
        ("mesh.replica=-1", ["more than one -1"]),
        ("mesh.tensor=8", ["num_query_heads (4)", "config.mesh.tensor"]),
        ("data.batch_size=12", ["(12)", "not divisible by the 8 devices"]),
        ("train.accumulation=3", ["batch_size (8)", "accumulation (3)"]),
        ("data.seq_len=0", ["config.data.seq_len is 0"]),
        ("data.sources=()", ["config.data.sources is empty"]),
        ("data.sources=('nowhere',)", ["nowhere"]),
        ("data.weights=(1.0,2.0)", ["config.data.weights has 2 values"]),
        ("loss.head_weights=(1.0,)", ["config.loss.head_weights has 1 values"]),
        (
            "compute.attention=splash",
            ["config.compute.attention is splash", "runs on TPUs", "'cpu'"],
        ),
        (
            "compute.attention=cudnn",
            ["config.compute.attention is cudnn", "runs on NVIDIA GPUs", "'cpu'"],
        ),
        ("train.steps=0", ["config.train.steps is 0"]),
        ("loss.schedule=sudden", ["config.loss.schedule is 'sudden'", "two_phase"]),
        ("loss.schedule=((5,1,1),)", ["config.loss.schedule begins at step 5"]),
        ("loss.schedule=((0,1,1),)", ["row of step 0", "has 2 values for 3 heads"]),
        ("loss.trunk_gradient=(1,-1,1)", ["config.loss.trunk_gradient", "has -1"]),
        ("loss.kind=soft", ["config.loss.kind is 'soft'", "e2e"]),
        ("loss.teacher=", ["config.loss.teacher is empty"]),
        ("optim.rates=(('body',2),)", ["config.optim.rates names 'body'", "heads"]),
        ("optim.frozen=body", ["config.optim.frozen names 'body'"]),
    ],
)
def test_a_wrong_config_is_refused(program, corpus_dir, tmp_path, override, words):
    workdir = tmp_path / "run"
    fields = [override]
    if "data.sources" not in override:
        fields.append(f"data.sources={corpus_dir}")

    overrides = [f"--config.{field}" for field in fields]
    result = program("train", TINY, f"--workdir={workdir}", *overrides)

    assert_refused(result, *words)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--workdir=x"], ["--config"]),
        (["train", TINY], ["--workdir"]),
        (["train", "--config=nowhere.py", "--workdir=x"], ["nowhere.py"]),
        (["train", TINY, "--workdir=x", "--steps=3"], ["--steps"]),
        (["train", "--config=configs/paper.py:8b-n4", "--workdir=x"], ["8b-n4", "13b"]),
        (["evaluate", "--workdir=nowhere"], ["nowhere"]),
        (["generate", "--workdir=nowhere", "--prompt=a"], ["nowhere"]),
        (["generate", "--workdir=x", "--prompt="], ["--prompt is empty"]),
        (["generate", "--workdir=x", "--prompt=a", "--decoder=magic"], ["plain"]),
        (["generate", "--workdir=x", "--prompt=a", "--temperature=-1"], ["is -1"]),
        (["generate", "--workdir=x", "--prompt=a", "--top_p=0"], ["top_p is 0"]),
        (["generate", "--workdir=x", "--prompt=a", "--top_p=1.1"], ["at most 1"]),
        (["generate", "--workdir=x", "--prompt=a", "--stop="], ["--stop is empty"]),
        (["generate", "--workdir=x", "--prompt=a", "--wide=3"], ["--wide"]),
        (["verify", "--workdir=nowhere"], ["nowhere"]),
        (["verify", "--workdir=x", "--decoder=plain:wide=3"], ["--wide", "none"]),
        (["verify", "--workdir=x", "--batch_sizes=1,0"], ["--batch_sizes", "above 0"]),
        (["prepare", "--input=nowhere", "--output=x"], ["nowhere"]),
        (["prepare", "--output=x"], ["--input"]),
    ],
)
def test_a_wrong_command_line_is_refused(program, monkeypatch, args, words):
    monkeypatch.chdir(ROOT)

    result = program(*args)

    assert_refused(result, *words)


def test_a_corpus_shorter_than_a_row_is_refused(program, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("one short document")
    output = tmp_path / "short"
    prepare(short, output, heldout=0)

    result = program(
        "train",
        TINY,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.sources={output}",
    )

    assert_refused(result, str(output), "67")  # seq_len + n_future_tokens
    assert not (tmp_path / "run").exists()


def test_an_empty_corpus_is_refused(program, tmp_path):
    (tmp_path / "empty.txt").write_text("")

    result = program(
        "prepare", f"--input={tmp_path / 'empty.txt'}", f"--output={tmp_path / 'out'}"
    )

    assert_refused(result, "empty")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_utf8_is_refused(program, tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))

    result = program(
        "prepare", f"--input={tmp_path / 'latin.txt'}", f"--output={tmp_path / 'out'}"
    )

    assert_refused(result, "latin.txt", "UTF-8")
    assert not (tmp_path / "out").exists()


def test_a_damaged_shard_is_refused(program, corpus_dir, tmp_path):
    broken = tmp_path / "corpus"
    shutil.copytree(corpus_dir, broken)
    shard = next(broken.glob("train-*.tokens"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)

    result = program(
        "train",
        TINY,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.sources={broken}",
    )

    assert_refused(result, shard.name)


def test_a_workdir_of_another_model_is_refused(program, corpus_dir, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    model = {"d_model": 512, "num_layers": 5}
    run = {"config": {"model": model}, "tokenizer": {"fingerprint": ""}}
    (workdir / "run.json").write_text(json.dumps(run))

    result = program(
        "train",
        TINY,
        f"--workdir={workdir}",
        f"--config.data.sources={corpus_dir}",
    )

    assert_refused(result, "another model", "d_model is 512 there and 64 here")
    assert [path.name for path in workdir.iterdir()] == ["run.json"]


def test_a_workdir_that_is_a_file_is_refused(program, corpus_dir, tmp_path):
    (tmp_path / "run").write_text("")

    result = program(
        "train",
        TINY,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.sources={corpus_dir}",
    )

    assert_refused(result, "is a file")


def test_a_workdir_without_a_checkpoint_is_refused(program, tmp_path):
    (tmp_path / "checkpoints").mkdir()

    result = program("evaluate", f"--workdir={tmp_path}")

    assert_refused(result, "no finished checkpoint")


def test_bugs_keep_their_traceback(monkeypatch):
    def bug(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(prepare_verb, "main", bug)
    monkeypatch.setattr(sys, "argv", ["mtp-jax", "prepare"])

    with pytest.raises(ZeroDivisionError):
        __main__.main()


@pytest.mark.parametrize("verb", [None, *__main__._VERBS])
def test_help_fits_on_a_screen(monkeypatch, capsys, verb):
    monkeypatch.setattr(sys, "argv", ["mtp-jax", *([verb] if verb else []), "--help"])

    try:
        code = __main__.main()
    except SystemExit as leaving:  # argparse leaves by itself
        code = leaving.code

    out = capsys.readouterr().out
    assert code == 0 and "usage" in out.lower()
    assert len(out.splitlines()) <= 40


def test_a_workdir_of_another_tokenizer_is_refused(program, corpus_dir, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    model = dataclasses.asdict(config_from(TINY.partition("=")[2], []).model)
    run = {"config": {"model": model}, "tokenizer": {"fingerprint": "another"}}
    (workdir / "run.json").write_text(json.dumps(run))

    result = program(
        "train", TINY, f"--workdir={workdir}", f"--config.data.sources={corpus_dir}"
    )

    assert_refused(result, "another tokenizer")
    assert [path.name for path in workdir.iterdir()] == ["run.json"]


def test_nothing_held_out_is_refused_before_the_run(program, tmp_path):
    text, data = tmp_path / "text.txt", tmp_path / "data"
    text.write_text("some words " * 100)
    prepare(text, data, heldout=0)

    result = program(
        "train", TINY, f"--workdir={tmp_path / 'run'}", f"--config.data.sources={data}"
    )

    assert_refused(result, "no held-out documents", "config.eval.every=0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "code", ["import nowhere", "x = ", "y = undefined", "def other(): pass"]
)
def test_a_config_that_is_broken_code_is_refused(program, tmp_path, code):
    path = tmp_path / "broken.py"
    path.write_text(code)

    result = program("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")

    assert_refused(result, "broken.py")


def test_a_prompt_that_is_not_unicode_is_refused(program, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\\ud800b"}\n')

    result = program("generate", "--workdir=nowhere", f"--prompts={path}")

    assert_refused(result, "not valid Unicode")


def test_a_damaged_tree_is_refused_before_the_model_is_read(program, tmp_path):
    path = tmp_path / "tree.json"
    path.write_text('{"paths": [[0], [0, ')

    options = ["--prompt=a", "--decoder=tree", f"--tree={path}"]
    result = program("generate", "--workdir=nowhere", *options)

    assert_refused(result, "tree.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["kind=linear", "layers=2"], ["a linear head is one matrix", "residual"]),
        (["kind=serial", "draft_cache=shared"], ["set config.heads.shared=True too"]),
        (["kind=causal", "hidden=after"], ["only serial heads have it"]),
    ],
)
def test_options_of_heads_that_exclude_each_other_are_refused(program, options, words):
    given = [f"--config.heads.{option}" for option in options]

    assert_refused(program("train", TINY, "--workdir=runs/x", *given), *words)


def test_tied_tables_with_one_a_head_are_refused(program):
    given = ["--config.heads.unembedding=own", "--config.model.tie_embeddings=True"]

    result = program("train", TINY, "--workdir=runs/x", *given)

    assert_refused(result, "config.heads.unembedding is own", "keep one of them")
