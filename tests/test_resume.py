"""A run that goes on: with other settings, without a config, after a stop."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from models import mesh_of
from runs import records, train_args

from mtp_jax.cli import train as verb
from mtp_jax.config import Config, DataConfig, config_from_json, config_to_json
from mtp_jax.data.batches import open_sources, pieces_of_step, train_batches
from mtp_jax.data.packing import batch_hash, format_hash, row_hash
from mtp_jax.distributed import hosts
from mtp_jax.errors import UserError
from mtp_jax.run.audit import audit
from mtp_jax.run.start import _rows_consumed

SMALL = (
    "--config.model.d_model=16",
    "--config.model.d_head=4",
    "--config.model.d_ff=16",
    "--config.data.seq_len=16",
    "--config.eval.sample_tokens=0",
    "--config.checkpoint.every=4",
)

pytestmark = pytest.mark.slow  # real runs, in processes of their own


@pytest.fixture(scope="module", autouse=True)
def on_one_device():
    """Programs for one of the devices compile in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtp_jax.run.train.make_mesh", lambda cfg: mesh_of())
        yield


def run(workdir, corpus, *overrides):
    assert verb.main([*train_args(workdir, corpus, *SMALL)[1:], *overrides]) == 0


def hashes(workdir):
    return {row["step"]: row["batch_hash"] for row in records(workdir)}


@pytest.fixture(scope="module")
def resized(tmp_path_factory, corpus_dir):
    """A run of 4 steps of 8 rows, then 2 of 16, then 2 of 8."""
    workdir = tmp_path_factory.mktemp("resized") / "run"
    run(workdir, corpus_dir, "--config.train.steps=4")
    run(workdir, corpus_dir, "--config.train.steps=6", "--config.data.batch_size=16")
    run(workdir, corpus_dir, "--config.train.steps=8")
    return workdir


def test_another_batch_size_goes_on_with_the_next_row(resized, corpus_dir):
    run_file = json.loads((resized / "run.json").read_text())
    cfg = config_from_json(run_file["config"], "run.json")
    rows = []  # one a batch: row k of the run, whatever size its batches have
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=1))
    batches = train_batches(cfg, np.arange(1), 0)
    for _ in range(4 * 8 + 2 * 16 + 2 * 8):
        rows.append({k: x[0] for k, x in next(batches).items() if k != "hash"})

    found, at = hashes(resized), 0
    for step, size in enumerate([8, 8, 8, 8, 16, 16, 8, 8], 1):
        of_step = [row_hash(row, i) for i, row in enumerate(rows[at : at + size])]
        assert found[step] == format_hash(batch_hash(np.stack(of_step))), step
        at += size
    assert [start["rows"] for start in run_file["runs"]] == [0, 32, 64]


def test_the_audit_proves_batches_of_all_sizes(resized):
    result = audit(resized, step=6)

    assert (result.steps, result.last_step, result.runs) == (8, 8, 3)
    written = json.loads((resized / "run.json").read_text())["config"]
    cfg = config_from_json(written, "run.json")
    rows = [
        row
        for step in range(6, 8)
        for row in pieces_of_step(cfg, step, open_sources(cfg))
    ]
    pieces = [[(p.document, p.begin, p.end) for p in row] for row in rows]
    told = [[(p.document, p.begin, p.end) for p in row] for row in result.rows]
    assert told == pieces  # rows 48 to 63


def test_every_start_has_its_config(resized):
    starts = json.loads((resized / "run.json").read_text())["runs"]

    assert [s["config"]["train"]["steps"] for s in starts] == [4, 6, 8]
    assert [s["config"]["data"]["batch_size"] for s in starts] == [8, 16, 8]


def test_a_resume_tells_every_change_and_what_it_does(tmp_path, corpus_dir, capsys):
    workdir = tmp_path / "run"
    run(workdir, corpus_dir, "--config.train.steps=4")
    capsys.readouterr()

    run(workdir, corpus_dir, "--config.train.steps=4")
    assert "changed" not in capsys.readouterr().out
    overrides = ("data.batch_size=16", "data.seed=3", "log.every=2")
    flags = [f"--config.{override}" for override in overrides]
    run(workdir, corpus_dir, "--config.train.steps=6", *flags)

    out = capsys.readouterr().out
    changed = [x for x in out.splitlines() if x.startswith("changed: ")]
    assert len(changed) == 4
    wanted = {
        "config.data.batch_size is 16, was 8: ": "row after the last one consumed",
        "config.data.seed is 3, was 0: ": "another order",
        "config.train.steps is 6, was 4: ": "last step",
        "config.log.every is 2, was 1: ": "nothing that is learned",
    }
    for (begin, end), line in zip(wanted.items(), sorted(changed), strict=False):
        assert any(begin in x and end in x for x in changed), (begin, changed, line)
    starts = json.loads((workdir / "run.json").read_text())["runs"]
    assert ["config" in start for start in starts] == [True, False, True]


def test_another_schedule_says_where_the_learning_rate_goes(
    tmp_path, corpus_dir, capsys
):
    workdir = tmp_path / "run"
    warm = "--config.optim.warmup_steps=2"
    run(workdir, corpus_dir, "--config.train.steps=4", warm)
    capsys.readouterr()

    run(workdir, corpus_dir, "--config.train.steps=6", warm)

    out = capsys.readouterr().out
    [line] = [x for x in out.splitlines() if "learning rate" in x]
    rate = records(workdir)[4]["lr"]
    assert f"of step 5 is {rate:.2e}; by the settings before" in line
    assert "would be 3.00e-04" in line  # 3 % of the peak, where the cosine ended


def test_a_workdir_alone_goes_on_as_before(tmp_path, corpus_dir, capsys):
    workdir = tmp_path / "run"
    run(workdir, corpus_dir, "--config.train.steps=4")
    run(tmp_path / "whole", corpus_dir, "--config.train.steps=4")
    run(tmp_path / "whole", corpus_dir, "--config.train.steps=6")

    assert verb.main([f"--workdir={workdir}"]) == 0
    assert verb.main([f"--workdir={workdir}", "--config.train.steps=6"]) == 0

    rows, whole = records(workdir), records(tmp_path / "whole")
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert len(rows) == 6
    with pytest.raises(UserError, match=r"holds no run.*--config=FILE"):
        verb.main([f"--workdir={tmp_path / 'none'}"])
    with pytest.raises(UserError, match="no field 'stepz'"):
        verb.main([f"--workdir={workdir}", "--config.train.stepz=6"])


def test_an_evaluation_that_a_stop_cut_off_is_made_up(
    tmp_path, corpus_dir, monkeypatch
):
    workdir, calm = tmp_path / "run", tmp_path / "calm"
    settings = ["--config.train.steps=6", "--config.eval.every=2"]
    settings.append("--config.checkpoint.keep_best=1")
    run(calm, corpus_dir, *settings)
    real = hosts.told_to_stop
    monkeypatch.setattr(hosts, "told_to_stop", lambda done: done == 2)
    run(workdir, corpus_dir, *settings)
    assert records(workdir, "heldout.jsonl") == []

    monkeypatch.setattr(hosts, "told_to_stop", lambda done: done == 3)
    run(workdir, corpus_dir, *settings)
    monkeypatch.setattr(hosts, "told_to_stop", real)
    run(workdir, corpus_dir, *settings)

    assert records(workdir, "heldout.jsonl") == records(calm, "heldout.jsonl")
    assert [row["step"] for row in records(calm, "heldout.jsonl")] == [2, 4, 6]


def test_local_checkpoints_know_the_rows_too(tmp_path, corpus_dir):
    workdir, local = tmp_path / "run", tmp_path / "local"
    often = [f"--config.checkpoint.local_dir={local}"]
    often += ["--config.checkpoint.local_every=2", "--config.checkpoint.every=99"]
    run(workdir, corpus_dir, "--config.train.steps=3", *often)
    shutil.rmtree(workdir / "checkpoints" / "3")
    size = "--config.data.batch_size=16"
    run(workdir, corpus_dir, "--config.train.steps=5", *often, size)
    shutil.rmtree(workdir / "checkpoints" / "5")

    run(workdir, corpus_dir, "--config.train.steps=6", *often)

    starts = json.loads((workdir / "run.json").read_text())["runs"]
    assert [(s["after"], s["rows"]) for s in starts] == [(0, 0), (2, 16), (4, 48)]
    assert audit(workdir).steps == 6


def test_checkpoints_of_before_resume_after_their_batches():
    cfg = Config(data=DataConfig(batch_size=12))

    old = {"config": config_to_json(cfg), "data": {"batches": 20}}

    assert _rows_consumed(old) == 240
    assert _rows_consumed({**old, "data": {"batches": 20, "rows": 7}}) == 7
