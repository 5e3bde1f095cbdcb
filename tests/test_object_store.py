"""A workdir in an object store: a bucket of an emulator on this machine."""

import json
import os
import socket
import subprocess
import sys
import time

import foreign
import pytest
from runs import finish, start, train_args

from mtp_jax.storage import absolute, is_remote

BUCKET = "mtp-jax-test"


@pytest.fixture
def bucket(monkeypatch):
    """Google Cloud Storage, as far as the libraries of this process can tell."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory"),
        *("--host=127.0.0.1", f"--port={port}", f"--default-bucket={BUCKET}"),
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("TENSORSTORE_GCS_NO_AUTH", "1")
        end = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert emulator.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        yield f"gs://{BUCKET}"
        emulator.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_in_a_bucket_goes_on_and_is_evaluated(bucket, corpus_dir):
    from etils import epath

    workdir = epath.Path(bucket) / "runs" / "tiny"
    often = "--config.checkpoint.every=3"

    def train(steps):
        args = train_args(workdir, corpus_dir, often, f"--config.train.steps={steps}")
        return finish(start(args))

    code, out, err = train(6)
    assert code == 0 and "begins" in out, err[-3000:]
    code, out, err = train(8)
    assert code == 0 and "continues after step 6" in out, err[-3000:]
    code, out, err = finish(
        start(["evaluate", f"--workdir={workdir}", "--max_batches=1"])
    )
    assert code == 0, err[-3000:]

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"3", "6", "8"}
    assert json.loads((workdir / "eval-batches1.json").read_text())["step"] == 8
    assert not os.path.exists("gs:")  # nothing of it is on this machine


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_import_goes_into_a_bucket(bucket, tmp_path):
    from etils import epath

    config = foreign.CONFIGS["qwen3"]
    folder = foreign.write_folder(tmp_path / "hf", config, foreign.tensors_of(config))
    workdir = epath.Path(bucket) / "runs" / "theirs"
    command = ["import", f"--from={folder}", "--tokenizer=bytes"]
    command.append(f"--workdir={workdir}")

    code, out, err = finish(start(command))
    again, _, refused = finish(start(command))

    assert code == 0 and f"written to {workdir}" in out, err[-3000:]
    assert json.loads((workdir / "import.json").read_text())["format"] == "hf"
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"0"}
    assert (workdir / "run.json").exists()
    assert again == 2 and "is not empty; give a new folder" in refused
    assert not os.path.exists("gs:")  # nothing of it is on this machine


def test_a_place_in_a_store_is_told_from_a_folder():
    from etils import epath

    assert is_remote(epath.Path("gs://bucket/run"))
    assert str(absolute(epath.Path("gs://bucket/run"))) == "gs://bucket/run"
    assert not is_remote(epath.Path("runs/x"))
    assert str(absolute(epath.Path("runs/x"))) == os.path.abspath("runs/x")


def test_hosts_share_a_secret_in_a_bucket_and_runs_there_are_listed(
    bucket, monkeypatch
):
    from etils import epath

    from mtp_jax.config import Config, config_to_json
    from mtp_jax.distributed.secret import VARIABLE, secret_of
    from mtp_jax.run.workdirs import list_runs

    monkeypatch.delenv(VARIABLE, raising=False)
    workdir = epath.Path(bucket) / "runs" / "many"
    other = secret_of(workdir, 1)
    assert other() is None

    made = secret_of(workdir, 0)()

    assert len(made) == 64 and other() == made == secret_of(workdir, 0)()
    (workdir / "run.json").write_text(json.dumps({"config": config_to_json(Config())}))
    (workdir / "metrics.jsonl").write_text('{"step": 3, "loss/head_1": 0.5}\n')
    (run,) = list_runs(epath.Path(bucket) / "runs")
    assert (run.workdir, run.step, run.loss) == (str(workdir), 3, 0.5)
    assert not os.path.exists("gs:")
