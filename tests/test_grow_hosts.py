"""Heads that several processes give a model are those that one gives it."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from models import mesh_of
from runs import (
    complete,
    complete_hosts,
    finish,
    finish_hosts,
    free_port,
    losses,
    start,
    start_hosts,
    told,
)
from runs import train_args as arguments_of_run

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.checkpoint.restore import restore_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus_dir):
    """A workdir of an ordinary model after a few steps."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    one = ["--config.model.n_future_tokens=1", f"--config.train.steps={STEPS}"]
    complete(arguments_of_run(workdir, corpus_dir, *one))
    return workdir


def saved(workdir):
    """The sums of all bits of the newest checkpoint, and what else is told of it."""
    checkpoints = Checkpoints(workdir)
    found = checkpoints.saved_metadata()
    checkpoints.close()
    return found


def params_of(workdir):
    return jax.device_get(restore_model(workdir, mesh=mesh_of()).params)


def start_losses(out):
    rows = [line.split() for line in out.splitlines()]
    return [float(row[1]) for row in rows if len(row) == 2 and row[0].isdecimal()]


def grown(base, tmp_path, *options):
    """The workdirs that one process and two of them write, and what they say."""
    command = ["grow", f"--workdir={base}", "--heads=3", "--fit_tokens=4096", *options]
    outs = [
        complete([*command, f"--output={tmp_path / 'one'}"], devices=2),
        complete_hosts([*command, f"--output={tmp_path / 'two'}"], 2),
    ]
    assert set(os.listdir(tmp_path)) == {"one", "two"}
    one, two = (set(os.listdir(tmp_path / name)) for name in ("one", "two"))
    assert one | {".secret"} == two >= {"run.json", "checkpoints"}
    return outs


@pytest.mark.parametrize(
    ("kind", "start", "rank"),
    [("parallel", "ridge", 0), ("serial", "ridge", 0), ("linear", "ridge", 4)],
)
def test_starts_on_two_hosts_are_those_on_one(base, tmp_path, kind, start, rank):
    options = [f"--config.heads.kind={kind}", f"--config.heads.markov_rank={rank}"]

    outs = grown(base, tmp_path, f"--start={start}", *options)

    one, two = (params_of(tmp_path / name) for name in ("one", "two"))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), one, two
    )
    was = params_of(base)
    np.testing.assert_array_equal(was["w_embedding"], two["w_embedding"])
    for name in ("w_q", "norm_mlp"):  # head 1's last layer is of the trunk, or heads
        last = two["trunk"] if kind != "parallel" else two["heads"]
        of_first = last[name][-1 if kind != "parallel" else 0]
        np.testing.assert_array_equal(was["heads"][name][0], of_first)
    found = [start_losses(out) for out in outs]
    assert len(found[0]) == 3
    np.testing.assert_allclose(*found, atol=2e-3)


def test_a_state_that_goes_on_is_the_same_to_the_bit(base, tmp_path):
    grown(base, tmp_path, "--start=copy", "--keep_optimizer")

    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")

    assert one == two and one["data"]["rows"] > 0
    assert any("mu" in name for name in one["checksums"]["training"])


def test_a_run_on_two_hosts_begins_with_the_model_of_another(base, tmp_path):
    command = [
        "train",
        f"--config=configs/finetune.py:heads,{base},3",
        *("--config.train.steps=3", "--config.eval.every=0", "--config.log.every=1"),
        *("--config.log.tensorboard=False", "--config.init.fit_tokens=4096"),
        "--config.mesh.fsdp=2",
    ]

    complete([*command, f"--workdir={tmp_path / 'one'}"], devices=2)
    complete_hosts([*command, f"--workdir={tmp_path / 'two'}"], 2)

    found = [losses(tmp_path / name) for name in ("one", "two")]
    assert len(found[0]) == 3
    np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("of_run", [True, False], ids=["of the run", "given"])
def test_a_host_that_does_not_come_is_waited_for(base, tmp_path, of_run):
    waits, source = 2, base
    if of_run:
        source = tmp_path / "run"
        shutil.copytree(base, source)
        run = json.loads((source / "run.json").read_text())
        run["config"]["train"]["join_timeout_s"] = waits
        (source / "run.json").write_text(json.dumps(run))
    command = ["grow", f"--workdir={source}", f"--output={tmp_path / 'two'}"]
    command += ["--heads=3", f"--coordinator=127.0.0.1:{free_port()}"]
    command += ["--num_processes=2", "--process_id=0"]
    command += [] if of_run else [f"--config.train.join_timeout_s={waits}"]

    code, _, err = finish(start(command), 120)

    assert code == 1 and len(told(err)) == 1
    assert f"host 1 of 2 did not come within {waits} s" in told(err)[0]
    assert not (tmp_path / "two").exists()


def test_heads_that_cannot_be_are_refused_on_all_hosts(base, tmp_path):
    command = ["grow", f"--workdir={base}", f"--output={tmp_path / 'two'}"]
    command += ["--heads=3", "--config.heads.kind=residual"]

    results = finish_hosts(start_hosts(command, 2))

    for code, _, err in results:
        assert code == 2 and "Traceback" not in err
        assert "residual heads have not" in told(err)[0] and len(told(err)) == 1
    assert not os.listdir(tmp_path)
