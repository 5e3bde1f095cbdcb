"""Runs as a user starts them: interrupted, damaged, continued, moved."""

import json
import random
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
from models import mesh_of
from runs import (
    ROOT,
    complete,
    finish,
    kill,
    newest_step,
    records,
    start,
    train_args,
    wait_for_step,
    without_timings,
)

from mtp_jax.decode.generator import Generator
from mtp_jax.errors import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus_dir):
    """A run of 40 steps that nothing interrupted, with everything switched on."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    out = complete(
        train_args(
            workdir,
            corpus_dir,
            "--config.train.steps=40",
            "--config.checkpoint.every=10",
            "--config.eval.every=20",
            "--config.log.tensorboard=True",
            "--config.log.profile_step=5",
        )
    )
    return workdir, out


def test_a_run_logs_every_metric_of_every_step(finished):
    workdir, out = finished

    rows = records(workdir)

    heads = [f"{kind}/head_{i}" for kind in ("loss", "accuracy") for i in (1, 2, 3)]
    wanted = {"step", "batch_hash", "loss", *heads, "accept/length", "grad_norm", "lr"}
    timings = {"tokens_per_s", "step_s", "data_wait_share", "goodput", "time"}
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert wanted | timings <= rows[0].keys()
    assert rows[-1]["loss/head_1"] < rows[0]["loss/head_1"]
    assert len({row["batch_hash"] for row in rows}) == 40
    assert all(len(row["batch_hash"]) == 16 for row in rows)
    assert "done: step 40" in out


def test_a_run_says_what_it_ran_on(finished):
    workdir, _ = finished

    run = json.loads((workdir / "run.json").read_text())

    assert run["config"]["model"]["n_future_tokens"] == 3
    assert run["versions"]["jax"] and run["device"]["count"] == 1
    assert run["mesh"] == {"replica": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


def test_rows_split_over_devices_give_the_same_run(finished, corpus_dir, tmp_path):
    expected, _ = finished

    complete(
        train_args(
            tmp_path / "run",
            corpus_dir,
            "--config.train.steps=40",
            "--config.eval.every=20",
            "--config.mesh.fsdp=1",
            "--config.mesh.sequence=2",
        ),
        devices=2,
    )

    for name in ("metrics.jsonl", "heldout.jsonl"):
        rows, wanted = records(tmp_path / "run", name), records(expected, name)
        assert len(rows) == len(wanted)
        for row, other in zip(rows, wanted, strict=True):
            assert row.get("batch_hash") == other.get("batch_hash")
            losses = [key for key in row if key.startswith(("loss", "accuracy"))]
            assert len(losses) >= 6
            for key in losses:
                assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-3), key
            assert row.get("prompt") == other.get("prompt")
            assert "sample" not in row or row["sample"]


def test_held_out_figures_and_sample_text_come_on_schedule(finished):
    workdir, out = finished

    rows = records(workdir, "heldout.jsonl")

    assert [row["step"] for row in rows] == [20, 40]
    assert rows[0]["bits_per_byte"] > rows[1]["bits_per_byte"] > 0
    assert rows[1]["sample"] and repr(rows[1]["sample"]) in out


def test_tensorboard_gets_the_scalars(finished):
    from tensorboardX.proto.event_pb2 import Event

    workdir, _ = finished
    data = next((workdir / "tensorboard").iterdir()).read_bytes()

    found = {}
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            found[value.tag, event.step] = value.simple_value
        data = data[12 + size + 4 :]

    row = records(workdir)[-1]
    assert found["metrics/loss", 40] == pytest.approx(row["loss"], rel=1e-6)
    assert ("heldout/bits_per_byte", 20) in found


def test_the_profiler_traces_the_chosen_steps(finished):
    workdir, _ = finished

    traces = list((workdir / "profile").rglob("*.xplane.pb"))

    assert len(traces) == 1 and traces[0].stat().st_size > 0


def test_a_finished_run_has_nothing_left_to_do(finished, corpus_dir):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()

    out = complete(
        train_args(
            workdir, corpus_dir, "--config.train.steps=40", "--config.eval.every=20"
        )
    )

    assert "done: step 40" in out
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path, corpus_dir, kills):
    """SIGKILL at random moments, saves included: the metrics of a calm run."""
    steps = f"--config.train.steps={20 * kills + 20}"
    often = "--config.checkpoint.every=2"
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    complete(train_args(calm, corpus_dir, steps, often))

    keys = random.Random(kills)
    for _ in range(kills):
        begun = newest_step(stormy)
        process = start(train_args(stormy, corpus_dir, steps, often))
        wait_for_step(process, stormy, max(1, begun - 2))
        time.sleep(keys.uniform(0, 0.8))
        kill(process)
    complete(train_args(stormy, corpus_dir, steps, often))

    assert without_timings(records(stormy)) == without_timings(records(calm))


def test_sigterm_saves_the_last_step_and_exits_well(tmp_path, corpus_dir):
    many = ("--config.train.steps=100000", "--config.checkpoint.every=100000")
    process = start(train_args(tmp_path / "run", corpus_dir, *many))
    wait_for_step(process, tmp_path / "run", 5)

    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    code, out, err = finish(process, timeout_s=60)

    took_s = time.monotonic() - asked
    last = records(tmp_path / "run")[-1]["step"]
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert code == 0 and took_s < 30, err[-2000:]
    assert saved == [str(last)]
    assert f"saved step {last}" in out


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(
    tmp_path, corpus_dir, finished
):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    newest = workdir / "checkpoints" / "40" / "params"
    victim = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, in the middle of the weights
    victim.write_bytes(content)

    code, _, err = finish(start(["evaluate", f"--workdir={workdir}"]))
    again = finish(start(train_args(workdir, corpus_dir, "--config.train.steps=40")))

    assert code == 0 and "checkpoints/40 is damaged" in err and "Traceback" not in err
    assert json.loads((workdir / "eval.json").read_text())["step"] == 30
    assert again[0] == 0 and "continues after step 30" in again[1]
    assert (workdir / "damaged" / "40").is_dir()
    calm, mended = records(finished[0]), records(workdir)
    assert without_timings(mended) == without_timings(calm)


def test_a_run_that_diverges_stops_clearly(tmp_path, corpus_dir):
    hot = ("--config.optim.peak_lr=1e38", "--config.train.max_bad_steps=3")

    code, _, err = finish(start(train_args(tmp_path / "run", corpus_dir, *hot)))

    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "not finite for 3 steps in a row" in err


@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, corpus_dir):
    """On a file system of 5 MB of its own, where the third checkpoint does not fit."""
    probe = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path],
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip("needs user namespaces")
    args = train_args(
        tmp_path / "run",
        corpus_dir,
        "--config.checkpoint.every=10",
        "--config.checkpoint.keep_latest=9",
    )
    python = f"{sys.executable} -m mtp_jax"
    script = (
        f"mount -t tmpfs -o size=5m tmpfs {tmp_path} && {{ "
        f"{python} {shlex.join(args)}; echo code $?; "
        f"{python} evaluate --workdir={tmp_path / 'run'}; }}"
    )

    code, out, err = finish(start(script, program=["unshare", "-rm", "sh", "-c"]))

    told = [line for line in err.splitlines() if line.startswith("mtp-jax: error:")]
    assert code == 0 and "code 2" in out
    assert len(told) == 1 and "no room on the disk" in told[0]
    assert "step 20 is intact" in told[0] and "Traceback" not in err
    assert "bits per byte" in out


@pytest.mark.slow
def test_eight_devices_train_and_one_evaluates_and_decodes(tmp_path, corpus_dir):
    workdir = tmp_path / "run"
    short = "--config.train.steps=4"
    complete(
        train_args(workdir, corpus_dir, short, "--config.mesh.tensor=2"), devices=8
    )

    complete(["evaluate", f"--workdir={workdir}"])
    all_heads = json.loads((workdir / "eval.json").read_text())
    complete(["evaluate", f"--workdir={workdir}", "--heads=1"])
    one_head = json.loads((workdir / "eval-heads1.json").read_text())
    decode = ["generate", f"--workdir={workdir}", "--prompt=import", "--json"]
    decode.append("--max_new_tokens=8")
    drafted = json.loads(complete(decode))
    plain = json.loads(complete([*decode, "--heads=1"]))

    assert len(all_heads["heads"]) == 3 and len(one_head["heads"]) == 1
    assert one_head["accept"] == {"length": 1.0, "by_head": []}
    assert one_head["heads"][0]["loss"] == pytest.approx(
        all_heads["heads"][0]["loss"], rel=1e-3
    )
    assert drafted["tokens"] == plain["tokens"] and len(plain["tokens"]) == 8

    generator = Generator.from_checkpoint(str(workdir), mesh_of(1, 1, 2), heads=2)
    [result] = generator.generate(["import"], max_new_tokens=8)
    assert result.tokens == plain["tokens"] and generator.cfg.n_future_tokens == 2
    with pytest.raises(UserError, match="has 3; give 1 to 3"):
        Generator.from_checkpoint(str(workdir), heads=9)
    with pytest.raises(UserError, match=r"has 66 tokens.*at most 64"):
        generator.generate(["a" * 65], max_new_tokens=8)


STORIES = [
    ROOT / "tests" / "data" / "stories.jsonl",
    *(ROOT.parent / "shared" / "data" / "tinystories").glob("*.jsonl"),
]


@pytest.mark.slow
@pytest.mark.parametrize("stories", STORIES, ids=lambda path: path.stem)
def test_sentencepiece_from_text_to_sample(tmp_path, stories):
    workdir, data = tmp_path / "run", tmp_path / "data"

    complete(
        ["prepare", f"--input={stories}", f"--output={data}", "--train_tokenizer=512"]
    )
    complete(
        train_args(
            workdir,
            data,
            "--config.model.vocab_size=512",
            "--config.train.steps=60",
        )
    )
    complete(["evaluate", f"--workdir={workdir}", "--max_batches=4"])
    made = complete(["generate", f"--workdir={workdir}", "--prompt=Once", "--json"])

    figures = json.loads((workdir / "eval-batches4.json").read_text())
    assert (workdir / "tokenizer.model").exists()
    assert figures["bytes"] > 1.5 * figures["tokens"]  # a token is more than a byte
    assert figures["heads"][0]["loss"] < 5.5  # less than log 512: it has learned
    assert json.loads(made)["text"]


@pytest.mark.slow
def test_a_run_of_single_row_microbatches_trains_and_is_evaluated(tmp_path, corpus_dir):
    workdir = tmp_path / "run"

    complete(
        train_args(
            workdir,
            corpus_dir,
            "--config.data.batch_size=2",
            "--config.train.accumulation=2",
            "--config.train.steps=2",
            "--config.eval.every=2",
        )
    )
    complete(["evaluate", f"--workdir={workdir}", "--max_batches=3"])

    assert records(workdir, "heldout.jsonl")[0]["step"] == 2
    assert json.loads((workdir / "eval-batches3.json").read_text())["step"] == 2
