"""Runs of several processes, as a user starts them: the same numbers as of one."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from runs import (
    ROOT,
    SMALL,
    audited,
    complete,
    complete_hosts,
    finish,
    finish_hosts,
    free_port,
    hashes,
    losses,
    mesh_options,
    records,
    start,
    start_hosts,
    told,
    train_args,
)

from mtp_jax.errors import UserError

# (replica, fsdp, tensor, sequence), each on every number of processes
MESHES = [(1, 8, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]
PROCESSES = [1, 2, 4, 8]


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory, corpus_dir):
    """One process of two devices, and two of one: a tensor axis that spans processes.

    Both hold every row of a batch then, so a batch that differed would go unnoticed by
    JAX; with microbatches, evaluation, sample text and checkpoints.
    """
    folder = tmp_path_factory.mktemp("pods")
    options = [
        *mesh_options((1, 1, 2, 1)),
        *SMALL,
        "--config.train.steps=6",
        "--config.train.accumulation=2",
        "--config.eval.every=3",
        "--config.checkpoint.every=3",
    ]
    complete(train_args(folder / "alone", corpus_dir, *options), devices=2)
    complete_hosts(train_args(folder / "together", corpus_dir, *options), 2)
    return folder / "alone", folder / "together"


def test_two_processes_compute_what_one_does(alone_and_together):
    alone, together = alone_and_together

    assert hashes(alone) == hashes(together) and len(hashes(alone)) == 6
    np.testing.assert_allclose(losses(alone), losses(together), rtol=1e-5)
    for key in ("bits_per_byte", "loss/head_3"):
        figures = [losses(d, "heldout.jsonl", key) for d in alone_and_together]
        np.testing.assert_allclose(*figures, rtol=1e-4)
    texts = [
        [(r["prompt"], r["sample"]) for r in records(d, "heldout.jsonl")]
        for d in alone_and_together
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    run = json.loads((together / "run.json").read_text())
    assert run["device"]["processes"] == 2 and run["runs"][0]["processes"] == 2


def test_the_time_of_a_run_is_accounted_for(alone_and_together):
    run = json.loads((alone_and_together[1] / "run.json").read_text())

    goodput = run["goodput"]
    spent = {kind for kind, s in goodput["seconds"].items() if s > 0}
    assert goodput["finished"]
    assert sum(goodput["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert spent == {"step", "compile", "data", "save", "restore", "evaluate", "start"}


@pytest.mark.slow
def test_a_damaged_checkpoint_of_many_hosts_is_passed_over(
    alone_and_together, tmp_path, corpus_dir
):
    """A byte that only one of the two processes reads."""
    workdir = tmp_path / "run"
    shutil.copytree(alone_and_together[1], workdir)
    newest = workdir / "checkpoints" / "6" / "params"
    victim = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    options = [*mesh_options((1, 1, 2, 1)), *SMALL, "--config.train.accumulation=2"]
    options += ["--config.train.steps=6", "--config.checkpoint.every=3"]

    args = train_args(workdir, corpus_dir, *options)
    results = finish_hosts(start_hosts(args, 2))
    again = complete_hosts(args, 2)

    for code, _, err in results:
        assert code == 1 and len(told(err)) == 1, err
        assert "checkpoints/6 is damaged" in told(err)[0]
        assert "moved to" in told(err)[0] and "Traceback" not in err
    assert "continues after step 3" in again
    assert (workdir / "damaged" / "6").is_dir()
    assert hashes(workdir) == hashes(alone_and_together[1])
    np.testing.assert_allclose(losses(workdir), losses(alone_and_together[1]), 1e-5)


def test_audit_tells_the_first_batch_that_differs(
    alone_and_together, tmp_path, corpus_dir
):
    workdir = tmp_path / "run"
    shutil.copytree(alone_and_together[0], workdir)
    rows = records(workdir)
    for row in rows[3:]:
        row["batch_hash"] = "0" * 16
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text)

    code, _, err = finish(start(["audit", f"--workdir={workdir}"]))

    assert code == 1 and len(told(err)) == 1
    assert "the batch of step 4 is not the one" in told(err)[0]


def test_audit_from_python_tells_what_its_verb_prints(alone_and_together):
    from mtp_jax.run.audit import audit

    workdir = alone_and_together[1]
    found = audit(workdir, step=2)

    assert dataclasses.asdict(found) == audited(workdir, "--step=2")
    assert (found.steps, found.last_step, found.runs) == (6, 6, 1)
    text = complete(["audit", f"--workdir={workdir}", "--step=2"]).splitlines()
    assert found.rows is not None and len(text) == len(found.rows) + 1
    first = found.rows[0][0]
    cut = f"{first.name} [{first.begin}:{first.end}] of {first.source}"
    assert text[0].startswith(f"row 0: {cut}")
    assert "step" not in audited(workdir) and audit(workdir).rows is None


def test_audit_tells_what_a_run_has_not(alone_and_together, tmp_path):
    from mtp_jax.run.audit import audit

    workdir = tmp_path / "run"
    shutil.copytree(alone_and_together[0], workdir)

    with pytest.raises(UserError, match="counted from 1"):
        audit(workdir, step=0)
    with pytest.raises(UserError, match="--step=7: the run ends at step 6"):
        audit(workdir, step=7)
    run = json.loads((workdir / "run.json").read_text())
    run["runs"][0]["after"] = 2
    (workdir / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="tells of no start before step 1"):
        audit(workdir)


@pytest.mark.slow
def test_gradients_that_are_not_finite_on_one_host_skip_the_step_on_all():
    address = f"127.0.0.1:{free_port()}"
    worker = (sys.executable, str(ROOT / "tests" / "poisoned_worker.py"))

    results = finish_hosts([start([address, i], program=worker) for i in range(2)])

    for code, out, err in results:
        assert code == 0 and "bad 1 same True" in out, (out, err[-2000:])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, corpus_dir):
    """200 steps of one process on the first of the meshes."""
    workdir = tmp_path_factory.mktemp("matrix") / "run"
    args = train_args(workdir, corpus_dir, *SMALL, "--config.train.steps=200")
    complete([*args, *mesh_options(MESHES[0])], devices=8, timeout_s=1800)
    return workdir


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", PROCESSES)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_any_mesh_on_any_number_of_processes(
    pods, request, tmp_path, corpus_dir, mesh, count
):
    reference = request.getfixturevalue("one_process")
    args = train_args(tmp_path / "run", corpus_dir, *SMALL, "--config.train.steps=200")
    args += mesh_options(mesh)

    if count == 1:
        complete(args, devices=8, timeout_s=1800)
    else:
        complete_hosts(args, count, devices=8 // count, timeout_s=1800)

    assert hashes(tmp_path / "run") == hashes(reference)
    found, wanted = losses(tmp_path / "run"), losses(reference)
    np.testing.assert_allclose(found[:20], wanted[:20], rtol=1e-5)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
