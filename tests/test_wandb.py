"""Runs logged to Weights & Biases, offline: what its file holds afterwards."""

import importlib.util
import json
import os
import pathlib
import pty
import shutil
import struct
import subprocess
import sys

import pytest
from etils import epath
from models import tiny_config
from runs import ROOT, complete, train_args

from mtp_jax.config import LogConfig
from mtp_jax.errors import UserError
from mtp_jax.run.scalar_logs import check_scalar_logs
from mtp_jax.run.weights_and_biases import WandbRun

_BLOCK, _HEADER = 32_768, 7
there = importlib.util.find_spec("wandb") is not None


def records(path):
    """Records of a .wandb file: pieces in blocks of 32 KiB, as LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, made = path.read_bytes(), _HEADER, []
    assert data[:4] == b":W&B"
    while at < len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # zeros to the end of the block
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        piece = data[at + _HEADER : at + _HEADER + length]
        made = [*made[:-1], made[-1] + piece] if kind in (3, 4) else [*made, piece]
        at += _HEADER + length
    return [Record.FromString(x) for x in made]


def history(path):
    """Rows of logged numbers, by their names."""
    return [
        {(x.key or ".".join(x.nested_key)): json.loads(x.value_json)
         for x in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]  # fmt: skip


def kept_id(workdir):
    """The id that a workdir keeps of its run."""
    return (workdir / "wandb" / "id").read_text().splitlines()[0]


@pytest.mark.packages
@pytest.mark.skipif(not there, reason="needs wandb")
def test_starts_of_a_run_are_one_run_there(corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "run"
    for steps in (4, 6):
        out = complete(
            train_args(
                workdir, corpus_dir, "--config.log.wandb=mine",
                f"--config.train.steps={steps}", "--config.checkpoint.every=4",
            )
        )  # fmt: skip
        assert "wandb:" not in out

    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    begun = [
        next(r.run for r in records(file) if r.WhichOneof("record_type") == "run")
        for file in files
    ]
    assert begun[0].run_id == begun[1].run_id == kept_id(workdir)
    assert {x.project for x in begun} == {"mine"}
    config = {x.key: json.loads(x.value_json) for x in begun[0].config.update}
    assert config["train"]["steps"] == 4 and config["log"]["wandb"] == "mine"
    rows = [row for file in files for row in history(file)]
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [row["step"] for row in written]
    assert [row["metrics/loss"] for row in rows] == [row["loss"] for row in written]


@pytest.mark.packages
@pytest.mark.skipif(not there, reason="needs wandb")
def test_who_is_not_logged_in_is_refused_and_never_asked(tmp_path, corpus_dir):
    """On a terminal, where the library would ask which account to use."""
    ours, theirs = pty.openpty()
    args = train_args(tmp_path / "run", corpus_dir, "--config.log.wandb=mine")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    nowhere = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "mtp_jax", *args],
        cwd=ROOT,
        env={**clean, **nowhere, "TERM": "xterm", "NETRC": str(tmp_path / "none")},
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        timeout=240,
        check=False,
    )
    os.close(theirs)
    told = os.read(ours, 1 << 16).decode()
    os.close(ours)

    assert done.returncode == 2, told
    assert "run wandb login, or set WANDB_MODE=offline" in told
    assert "Traceback" not in told and "Enter your choice" not in told


@pytest.mark.packages
@pytest.mark.skipif(not there, reason="needs wandb")
def test_a_copy_of_a_workdir_is_a_run_of_its_own_there(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, copy = tmp_path / "first", tmp_path / "copy"

    def starts(workdir, step):
        run = WandbRun(tiny_config(), epath.Path(workdir))
        run.add(step, {"loss": 1.0})
        run.close(failed=False)

    starts(first, 1)
    shutil.copytree(first, copy, ignore=shutil.ignore_patterns("offline-run-*"))
    starts(first, 2)
    starts(copy, 2)

    def ids(workdir):
        files = workdir.glob("wandb/offline-run-*/*.wandb")
        return [r.run.run_id for file in files for r in records(file)
                if r.WhichOneof("record_type") == "run"]  # fmt: skip

    assert ids(first) == 2 * [kept_id(first)]
    assert ids(copy) == [kept_id(copy)] and kept_id(copy) != kept_id(first)


def test_without_its_package_it_is_refused_before_anything_else(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = tiny_config()
    check_scalar_logs(cfg)
    log = LogConfig(wandb="mine")
    with pytest.raises(UserError, match=r"pip install 'mtp-jax\[wandb\]'"):
        check_scalar_logs(type(cfg)(model=cfg.model, log=log))


class Lost:
    """Stands in for the library, which fails after the run began."""

    Error = RuntimeError

    def __init__(self):
        self.calls = []

    def init(self, **settings):
        self.settings = settings
        self.could_ask = sys.stdin.isatty() or os.environ.get("TERM") != "dumb"
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        self.calls.append(row)
        raise OSError("the service is gone")

    def finish(self, **options):
        self.calls.append(options)


def test_a_run_goes_on_where_its_service_is_lost(tmp_path, monkeypatch, capsys):
    lost = Lost()
    monkeypatch.setitem(sys.modules, "wandb", lost)
    run = WandbRun(tiny_config(), epath.Path(tmp_path))
    for step in (1, 2):
        run.add(step, {"loss": 1.0})
    run.close(failed=False)

    assert lost.calls == [{"step": 1, "loss": 1.0}]
    assert "gets no more of this run: the service is gone" in capsys.readouterr().err


class Terminal:
    """Stands in for the stdin of somebody who could be asked."""

    def isatty(self):
        return True


@pytest.mark.parametrize("name", ["xterm", None])
def test_a_library_that_could_ask_finds_nobody(tmp_path, monkeypatch, name):
    lost, terminal = Lost(), Terminal()
    monkeypatch.setitem(sys.modules, "wandb", lost)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.delenv("TERM", raising=False)
    if name is not None:
        monkeypatch.setenv("TERM", name)

    WandbRun(tiny_config(), epath.Path(tmp_path))

    assert not lost.could_ask
    assert sys.stdin is terminal and os.environ.get("TERM") == name


def test_an_id_stays_with_its_workdir(tmp_path, monkeypatch):
    lost = Lost()
    monkeypatch.setitem(sys.modules, "wandb", lost)

    def id_at(workdir):
        WandbRun(tiny_config(), epath.Path(workdir))
        assert lost.settings["id"] == kept_id(pathlib.Path(workdir))
        return lost.settings["id"]

    first, copy, old = (tmp_path / name for name in ("first", "copy", "old"))
    made = id_at(first)
    monkeypatch.chdir(tmp_path)
    assert id_at(first) == id_at("first") == made

    shutil.copytree(first, copy)
    assert id_at(copy) != made and id_at(copy) == id_at(copy)
    assert id_at(first) == made

    (old / "wandb").mkdir(parents=True)
    (old / "wandb" / "id").write_text("0123456789ab")  # before workdirs were kept
    assert id_at(old) == "0123456789ab"
    shutil.copytree(old, tmp_path / "older")
    assert id_at(tmp_path / "older") != "0123456789ab"


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_that_fails_is_told_to_have_failed(tmp_path, monkeypatch, failed):
    lost = Lost()
    monkeypatch.setitem(sys.modules, "wandb", lost)

    WandbRun(tiny_config(), epath.Path(tmp_path)).close(failed)

    assert lost.calls == [{"exit_code": int(failed)}]
    assert len(kept_id(tmp_path)) == 12


def test_a_folder_of_its_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    cfg = tiny_config()
    with pytest.raises(UserError, match="needs the package wandb"):
        check_scalar_logs(type(cfg)(model=cfg.model, log=LogConfig(wandb="mine")))
