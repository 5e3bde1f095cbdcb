"""Recipes of finetuning: what they move, and what they leave as it is."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from corpora import make_corpus
from grown_models import Text
from models import TINY, mesh_of, placed_batch, placed_params, random_params
from runs import complete, finish, losses, records, start, told, train_args
from test_configs import load

from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.config import Config, HeadsConfig, OptimConfig, config_to_json
from mtp_jax.config.regrow import regrown_config
from mtp_jax.errors import UserError
from mtp_jax.exporting import tensors
from mtp_jax.exporting.parts import parts_of
from mtp_jax.growth.starts import started
from mtp_jax.growth.states import new_state
from mtp_jax.training.train_step import make_step

ONE = dataclasses.replace(TINY, num_layers=4, n_future_tokens=1)
OPTIM = OptimConfig(peak_lr=0.01, warmup_steps=2)


def run_of(folder, model):
    """A workdir as far as configs/finetune.py reads it."""
    folder.mkdir()
    config = Config(model=model, optim=OPTIM)
    content = {"config": config_to_json(config)}
    (folder / "run.json").write_text(json.dumps(content))
    return str(folder)


def steps(cfg, params, batches, count=4):
    """Parameters after so many steps of a config."""
    state = new_state(cfg, placed_params(cfg.model, jax.device_get(params)))
    step = make_step(cfg)
    for i in range(count):
        rows = batches[i % len(batches)]
        rows = rows | {"hash": np.zeros((len(rows["tokens"]), 2), np.uint32)}
        state, _ = step(state, placed_batch(rows, 1))
    return jax.device_get(state.params)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_on_a_model_that_stays_to_the_bit(one_device, tmp_path, tied):
    one = dataclasses.replace(ONE, tie_embeddings=tied)
    cfg = load("finetune", f"heads,{run_of(tmp_path / 'run', one)},3")
    params = placed_params(one, random_params(one))
    before = started(one, cfg.model, params, "copy", None, 0)
    before = jax.device_get(before)

    after = steps(cfg, before, list(Text(cfg.model).rows()))

    for name in before.keys() - {"heads", "norm"}:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    for name in ("heads", "norm"):
        pairs = zip(
            jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True
        )
        for was, now in pairs:
            np.testing.assert_array_equal(was[0], now[0])
            assert not np.array_equal(was[1], now[1])
            assert not np.array_equal(was[2], now[2])


def test_one_head_of_four_learns_as_its_path_alone(one_device, tmp_path):
    four = dataclasses.replace(TINY, num_layers=6, n_future_tokens=4)
    cfg = load("finetune", f"last,{run_of(tmp_path / 'run', four)}")
    cfg = dataclasses.replace(cfg, optim=OPTIM)
    assert cfg.model == regrown_config(four, 1, HeadsConfig())
    params = placed_params(four, random_params(four))
    rows = list(Text(four).rows())
    cut = [{name: x[:, :-3] for name, x in row.items()} for row in rows]
    grown = started(four, cfg.model, params, "copy", None, 0)

    alone = steps(cfg, grown, cut)

    # All four heads, of which the others have no loss.
    loss = dataclasses.replace(cfg.loss, head_weights=(1.0, 0.0, 0.0, 0.0))
    whole = Config(model=four, loss=loss, optim=cfg.optim)
    together = steps(whole, params, rows)
    path = regrown_of(four, cfg.model, together)
    exported = [weights_of(cfg, found) for found in (alone, path)]
    assert exported[0].keys() == exported[1].keys()
    for name, x in exported[0].items():
        np.testing.assert_allclose(exported[1][name], x, rtol=2e-4, atol=2e-5)
    start = weights_of(cfg, jax.device_get(grown))
    name = "model.layers.2.mlp.up_proj.weight"
    assert np.abs(start[name] - exported[0][name]).max() > 0.01


def regrown_of(before, after, params):
    placed = placed_params(before, params)
    return jax.device_get(started(before, after, placed, "copy", None, 0))


def weights_of(cfg, params):
    from export_models import random_model

    mesh = jax.sharding.get_mesh()
    placed = placed_params(cfg.model, params)
    model = dataclasses.replace(random_model(n=1, mesh=mesh), config=cfg, params=placed)
    return parts_of(model).llama


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("heads", "is not RECIPE,WORKDIR"),
        ("best,runs/mine", "recipes are heads, joint, lora, last"),
        ("heads,/nowhere", "holds no run"),
    ],
)
def test_recipes_that_cannot_be_are_refused(argument, message):
    with pytest.raises(UserError, match=message):
        load("finetune", argument)


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus_dir):
    """A workdir of an ordinary model that learned a little."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    options = ["--config.train.steps=200", "--config.optim.peak_lr=0.005"]
    one = "--config.model.n_future_tokens=1"
    complete(train_args(workdir, corpus_dir, one, *options))
    return workdir


def table(out):
    """Start losses that `grow` printed."""
    rows = [line.split() for line in out.splitlines()]
    return [float(row[1]) for row in rows if len(row) == 2 and row[0].isdecimal()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_four_heads_becomes_what_its_path_alone_becomes(tmp_path, corpus_dir):
    """The path of head 1 is exported and imported, so nothing else can come with it."""
    four, path = tmp_path / "four", tmp_path / "path"
    of_four = ["--config.model.num_layers=6", "--config.model.n_future_tokens=4"]
    complete(train_args(four, corpus_dir, *of_four, "--config.train.steps=30"))
    complete(["export", f"--workdir={four}", f"--output={path}", "--heads=1"])
    complete(
        [
            "import",
            f"--from={path}",
            f"--workdir={tmp_path / 'one'}",
            "--tokenizer=bytes",
        ]
    )
    tuned = {}
    for name in ("four", "one"):
        run, output = tmp_path / f"{name}_tuned", tmp_path / f"{name}_out"
        recipe = [f"--config=configs/finetune.py:last,{four}", f"--workdir={run}"]
        recipe += [f"--config.init.workdir={tmp_path / name}"]
        recipe += ["--config.train.steps=10", "--config.optim.warmup_steps=2"]
        complete(["train", *recipe, "--config.optim.peak_lr=0.005"])
        complete(["export", f"--workdir={run}", f"--output={output}"])
        tuned[name] = tensors.read(output)

    before = tensors.read(path)
    assert tuned["four"].keys() == tuned["one"].keys() == before.keys()
    for name, x in tuned["four"].items():
        np.testing.assert_array_equal(tuned["one"][name], x)
        assert not np.array_equal(before[name], x)
    np.testing.assert_array_equal(*(losses(tmp_path / f"{n}_tuned") for n in tuned))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_ridge_start_is_near_the_frequencies_or_below(base, tmp_path):
    grown = {}
    for start_name in ("copy", "ridge", "unigram"):
        rank = ["--config.heads.markov_rank=4"] if start_name == "unigram" else []
        where = [f"--workdir={base}", f"--output={tmp_path / start_name}"]
        out = complete(["grow", *where, "--heads=3", f"--start={start_name}", *rank])
        grown[start_name] = table(out)

    assert len(grown["ridge"]) == 3
    # The bias of frequencies alone has the loss of the frequencies.
    assert grown["unigram"][1] == pytest.approx(grown["unigram"][2], abs=0.1)
    assert grown["ridge"][1] <= grown["unigram"][1] + 0.5
    assert grown["ridge"][1] < grown["copy"][1]
    assert len({losses_[0] for losses_ in grown.values()}) == 1
    again = [f"--workdir={base}", f"--output={tmp_path / 'copy'}", "--heads=3"]
    code, _, err = finish(start(["grow", *again]))
    assert code == 2
    assert "is not empty" in told(err)[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_begins_with_the_model_of_another(base, tmp_path):
    """By `grow` and by `config.init` the same; what is frozen stays; it goes on."""
    recipe = f"--config=configs/finetune.py:heads,{base},3"
    common = [recipe, "--config.train.steps=6", "--config.eval.every=0"]
    common += ["--config.log.every=1", "--config.log.tensorboard=False"]
    complete(["train", f"--workdir={tmp_path / 'a'}", *common])
    where = [f"--workdir={base}", f"--output={tmp_path / 'b'}", "--heads=3"]
    complete(["grow", *where])
    complete(["train", f"--workdir={tmp_path / 'b'}", *common])

    np.testing.assert_array_equal(losses(tmp_path / "a"), losses(tmp_path / "b"))
    assert len(losses(tmp_path / "a")) == 6
    assert all(math.isfinite(x) for x in losses(tmp_path / "a"))
    mesh = mesh_of()
    was, now = (restore_model(x, mesh=mesh).params for x in (base, tmp_path / "a"))
    np.testing.assert_array_equal(was["w_embedding"], now["w_embedding"])
    jax.tree.map(np.testing.assert_array_equal, was["trunk"], now["trunk"])
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x[0], y[0]),
        was["heads"],
        now["heads"],
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_grown_run_goes_on_where_the_one_before_stood(base, tmp_path):
    where = [f"--workdir={base}", f"--output={tmp_path / 'b'}", "--heads=2"]
    out = complete(["grow", *where, "--start=copy", "--keep_optimizer"])
    assert "step 200" in out

    train = ["train", f"--workdir={tmp_path / 'b'}", "--config.train.steps=203"]
    out = complete(train)

    assert "continues after step 200" in out
    assert [row["step"] for row in records(tmp_path / "b")] == [201, 202, 203]
    # Of head 1 as good as before, not as of new moments at the peak rate.
    before = losses(base, key="loss/head_1")[-20:]
    after = losses(tmp_path / "b", key="loss/head_1")
    assert after.max() < before.max() + 0.3


def test_a_run_of_another_model_cannot_begin_so(tmp_path):
    other = run_of(tmp_path / "run", ONE)
    corpus = make_corpus(
        tmp_path / "text", [f"text {i} " * 30 for i in range(60)], heldout=0.2
    )
    args = train_args(tmp_path / "out", corpus, f"--config.init.workdir={other}")

    code, _, err = finish(start(args))

    assert code == 2
    assert "has another model" in told(err)[-1]
    assert not (tmp_path / "out").exists()
