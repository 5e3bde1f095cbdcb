"""Every benchmark at its smallest size prints its table; speed is not judged here."""

import dataclasses
import importlib
import types

import jax
import pytest
from models import mesh_of

from benchmarks import timing
from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import DataConfig
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.model.language_model import model_builder

SHAPE = ["--rounds=1", "--d_model=16", "--d_ff=24", "--num_heads=2"]
ROWS = ["--seq_len=16", "--batch_size=2"]


def run(name, *argv):
    return importlib.import_module(f"benchmarks.{name}").main(list(argv))


def test_ratios_are_taken_round_by_round():
    assert timing.ratio([2, 6, 12, 4, 50], [1, 2, 3, 4, 10]) == (3, 2, 4)
    assert timing.ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_functions_take_turns_after_one_call_each():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}

    seconds = timing.interleaved(functions, rounds=2)

    assert "".join(calls) == "ababab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_tables_are_aligned(capsys):
    timing.print_table(("name", "ms"), ("a", 1), ("longer", 100))

    assert capsys.readouterr().out == "name     ms\na         1\nlonger  100\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argv", "rows"),
    [
        (
            "head_loss",
            [*SHAPE, *ROWS, "--vocab_size=32", "--trunk_layers=1", "--chunk_tokens=8"],
            ["fused", "remat", "naive"],
        ),
        (
            "head_kinds",
            [
                *SHAPE,
                *ROWS,
                "--vocab_size=32",
                "--num_layers=3",
                "--n=2",
                "--kinds",
                "serial",
                "linear",
            ],
            ["serial", "linear"],
        ),
        (
            "objectives",
            [*SHAPE, *ROWS, "--vocab_size=32", "--trunk_layers=1", "--n=2"],
            ["kl", "e2e", "encodec"],
        ),
        (
            "heads",
            [*SHAPE, *ROWS, "--vocab_sizes", "32", "--num_layers=3", "--n=2"],
            ["32"],
        ),
        (
            "checkpoint_overhead",
            [*SHAPE, *ROWS, "--vocab_size=32", "--num_layers=2", "--n=1", "--steps=1"],
            ["without a save", "with one of"],
        ),
        ("dispatch", ["--steps=3"], ["call", "call and step"]),
        (
            "draft_cost",
            [*SHAPE, "--num_layers=3", "--n", "2", "--batch_sizes", "1", "2"],
            ["2, 1", "2, 2"],
        ),
        (
            "packed_weights",
            ["--rounds=1", "--outputs=8", "--inputs=4", "--megabytes=0"],
            ["1, XLA's", "2, XLA's", "4, XLA's", "8, XLA's"],
        ),
        (
            "input_pipeline",
            ["--rounds=1", "--batches=2", "--seq_len=64", "--batch_size=2"],
            ["pipeline", "step"],
        ),
        (
            "data_scale",
            [
                "--documents",
                "3000",
                "--tokens=20",
                "--shard_tokens=9000",
                "--speed=1",
                "--seq_len=64",
                "--batch_size=4",
                "--rounds=1",
                "--batches=2",
            ],
            ["all", "blocks"],
        ),
        (
            "hosts",
            [
                "--hosts=16",
                "--processes=2",
                "--slow=2",
                "--strangers=20",
                "--beats=1",
                "--host_timeout_s=18",
            ],
            [
                "all have joined",
                "a barrier of all",
                "a stranger is turned away",
                "20 strangers at once are",
                "SIGTERM of one: all know the last step",
                "process 0 fails: all have ended",
                "with 2 that read nothing: one is lost, all others have ended",
                "a host with another config: all are refused",
            ],
        ),
        (
            "long_run",
            ["--steps=100", "--every=10", "--warm=10"],
            ["1", "4", "records lost or doubled: 0"],
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_benchmark_prints_its_table(name, argv, rows, capsys):
    assert run(name, *argv) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python ")
    for row in rows:
        assert any(f"{line} ".startswith(f"{row} ") for line in lines), (row, lines)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["blocks", "all"])
def test_hosts_that_start_far_into_many_documents_agree(order, capsys):
    argv = ["--documents", "3000", "--tokens=20", "--shard_tokens=9000"]

    assert run("data_scale", *argv, "--seq_len=64", "--batch_size=8",
               f"--order={order}") == 0  # fmt: skip

    row = capsys.readouterr().out.splitlines()[-1].split()
    assert (row[0], row[2], row[-1]) == ("3e+03", "7", "yes")


def test_decoders_take_turns_on_the_same_prompts(
    monkeypatch, tmp_path, corpus_dir, capsys
):
    from benchmarks import decode

    cfg = timing.config_of(
        timing.options([], "", d_model=16, d_ff=24, num_heads=2, num_layers=3),
        n=2,
        vocab_size=256,
    )
    cfg = dataclasses.replace(cfg, data=DataConfig(sources=(str(corpus_dir),)))
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        params = jax.jit(model_builder(cfg.model)[0])(jax.random.key(0))
    restored = Restored(cfg, params, mesh, 1, ByteTokenizer())
    monkeypatch.setattr(decode, "restore_model", lambda workdir: restored)
    monkeypatch.setattr(decode.importlib.util, "find_spec", lambda name: None)
    argv = ["--rounds=1", "--prompts=2", "--prompt_tokens=8", "--max_new_tokens=4"]
    tree = tmp_path / "tree.json"
    tree.write_text('{"nodes": [{"path": [0]}, {"path": [1]}]}')
    decoders = ["blockwise", "blockwise+adaptive", f"tree:tree={tree}"]
    argv += ["--batch_sizes", "2", "--decoders", *decoders]

    assert run("decode", *argv) == 0

    lines = capsys.readouterr().out.splitlines()[-4:]
    names = [f"2, {name} " for name in ("plain", *decoders)]
    assert all(map(str.startswith, lines, names)), lines
    few = {"prompts": 3, "prompt_tokens": 8, "text": "", "shuffled": 0}
    plain = decode._prompts(restored, types.SimpleNamespace(**few))
    mixed = decode._prompts(restored, types.SimpleNamespace(**few | {"shuffled": 1}))
    assert [sorted(p) for p in mixed] == [sorted(p) for p in plain]
    assert any((a != b).any() for a, b in zip(plain, mixed, strict=True))
    prose = tmp_path / "prose.txt"
    prose.write_text("One day a girl went out.")
    few["text"] = str(prose)
    taken = decode._prompts(restored, types.SimpleNamespace(**few))
    assert [bytes(p.tolist()) for p in taken] == [b"One day ", b"a girl w", b"ent out."]


def test_options_become_a_config():
    argv = [*SHAPE, *ROWS, "--remat=dots"]
    shape = {"rounds": 9, "d_model": 64, "d_ff": 8, "num_heads": 4, "num_layers": 3}
    rows = {"seq_len": 8, "batch_size": 1, "remat": "none"}
    args = timing.options(argv, "", **shape, **rows)

    cfg = timing.config_of(args, n=2, vocab_size=32)

    model = cfg.model
    assert (model.d_model, model.d_ff, model.num_layers) == (16, 24, 3)
    assert (model.num_query_heads, model.num_kv_heads, model.d_head) == (2, 2, 8)
    assert (model.n_future_tokens, model.vocab_size) == (2, 32)
    assert (cfg.data.seq_len, cfg.data.batch_size) == (16, 2)
    assert (cfg.compute.remat, cfg.compute.head_loss) == ("dots", "fused")
    assert timing.config_of(args, n=1, num_layers=5).model.num_layers == 5


@pytest.mark.parametrize(
    ("name", "argv", "words"),
    [
        ("heads", ["--rounds=0"], "'0' is not a whole number above 0"),
        ("heads", ["--rounds=x"], "'x' is not a whole number above 0"),
        ("heads", ["--n=9"], "more than config.model.num_layers (8)"),
        ("heads", ["--num_heads=600"], "config.model.d_head is 0"),
        ("heads", ["--num_heads=0"], "config.model.num_query_heads is 0"),
        ("heads", ["--remat=most"], "config.compute.remat is 'most'"),
        ("head_loss", ["--head_loss=naive"], "unrecognized arguments: --head_loss"),
        ("dispatch", ["--steps=0"], "--steps"),
        ("decode", ["--decoders", "best"], "--decoder=best is unknown"),
        (
            "engines",
            ["--workdir=D", "--questions=F", "--vllm=python3"],
            "the folder of --hf",
        ),
        ("input_pipeline", ["--config=nowhere.py"], "--config=nowhere.py is not a"),
        ("input_pipeline", ["--input=nowhere"], "--input=nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(name, argv, words, capsys):
    assert run(name, *argv) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.packages
def test_torch_trains_the_same_shape(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")

    argv = [*SHAPE, *ROWS, "--vocab_sizes", "32", "--num_layers=2"]
    assert run("torch_baseline", *argv) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("torch ")
    assert lines[-1].startswith("32 ")


def test_torch_that_is_absent_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert run("torch_baseline") == 2
    assert "pip install '.[bench]'" in capsys.readouterr().err
