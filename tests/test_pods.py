"""Runs of several processes, as a user starts them: the same numbers, nothing lost."""

import dataclasses
import json
import shutil
import signal
import sys

import numpy as np
import pytest
from runs import (
    ROOT,
    complete,
    complete_hosts,
    finish,
    finish_hosts,
    free_port,
    records,
    start,
    start_hosts,
    told,
    train_args,
    wait_for_step,
)

from mtp_jax.errors import UserError

# (replica, fsdp, tensor, sequence), each on every number of processes
MESHES = [(1, 8, 1, 1), (2, 4, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]
PROCESSES = [1, 2, 4, 8]
SMALL = ("--config.data.seq_len=32", "--config.optim.peak_lr=3e-3")


@pytest.fixture(scope="module")
def two_corpora(tmp_path_factory, corpus_dir):
    """Two sources whose epochs end within a few steps, and the options of a mixture."""
    from mtp_jax.data.prepare import prepare

    folder = tmp_path_factory.mktemp("sources")
    options = []
    for name, count in (("few", 9), ("many", 30)):
        lines = [
            json.dumps({"text": f"{name} {i} " + "words " * (7 + 13 * i % 29)})
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        source, output = folder / f"{name}.jsonl", folder / name
        prepare(source, output, heldout=0)
        options.append(str(output))
    return [
        f"--config.data.sources={tuple(options)}",
        "--config.data.weights=(1.0,3.0)",
        *SMALL,
    ]


def hashes(workdir):
    return [row["batch_hash"] for row in records(workdir)]


def losses(workdir, name="metrics.jsonl", key="loss"):
    return np.array([row[key] for row in records(workdir, name)])


def mesh_options(mesh):
    names = ("replica", "fsdp", "tensor", "sequence")
    return [f"--config.mesh.{name}={n}" for name, n in zip(names, mesh, strict=True)]


def audited(workdir, *options):
    return json.loads(complete(["audit", f"--workdir={workdir}", "--json", *options]))


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


def test_any_number_of_hosts_goes_on_where_another_stopped(tmp_path, two_corpora):
    """1 -> 2 -> 1 processes, one stopped by a SIGTERM to one host, one by a SIGKILL."""
    options = [*two_corpora[1:], "--config.checkpoint.every=2"]
    sources = two_corpora[0].partition("=")[2]
    calm, moved = tmp_path / "calm", tmp_path / "moved"
    complete(train_args(calm, sources, *options, "--config.train.steps=14"))
    many, few = "--config.train.steps=100000", "--config.train.steps=14"

    complete(train_args(moved, sources, *options, "--config.train.steps=2"))
    hosts = start_hosts(train_args(moved, sources, *options, many), 2)
    wait_for_step(hosts[0], moved, 4)
    hosts[1].send_signal(signal.SIGTERM)
    stopped = finish_hosts(hosts)
    shutil.copytree(moved, tmp_path / "stopped")

    last = records(moved)[-1]["step"]
    assert [code for code, *_ in stopped] == [0, 0], stopped
    assert f"told to stop: saved step {last}" in stopped[0][1]
    complete(train_args(moved, sources, *options, few))
    assert hashes(moved)[:14] == hashes(calm)
    report = audited(moved, "--step=3")
    assert report["steps"] == report["last_step"] == len(records(moved))
    assert len(report["rows"]) == 8


def test_every_document_is_seen_exactly_once_an_epoch(two_corpora):
    """By what `audit --step` tells of each step, in the first epoch of each source."""

    from mtp_jax.cli.args import config_from
    from mtp_jax.data.batches import open_sources, pieces_of_step

    cfg = config_from(str(ROOT / "configs" / "tiny.py"), two_corpora)
    sources = open_sources(cfg, splits=["train"])
    stream = [row for step in range(40) for row in pieces_of_step(cfg, step, sources)]
    for source, corpus in enumerate(sources):
        lengths = corpus.documents("train").lengths.astype(int)
        n_rows = -(-(int(lengths.sum()) - 1) // cfg.data.seq_len)
        epoch = [row for row in stream if row[0].source == source][:n_rows]
        assert len(epoch) == n_rows
        seen = [np.zeros(n, int) for n in lengths]
        for row in epoch:
            left = cfg.data.seq_len  # the tokens after them belong to the next row, too
            for piece in row:
                end = min(piece.end, piece.begin + left)
                seen[piece.document][piece.begin : end] += 1
                left -= end - piece.begin
        counts = np.concatenate(seen)
        # The very last token of an epoch has no target.
        assert counts.max() == 1 and (counts == 0).sum() <= 1


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


def test_a_second_run_on_a_workdir_is_refused_and_a_kill_frees_it(tmp_path, corpus_dir):
    args = train_args(tmp_path / "run", corpus_dir, "--config.train.steps=100000")
    first = start(args)
    wait_for_step(first, tmp_path / "run", 1)

    code, _, err = finish(start(args))
    first.kill()
    first.communicate()

    assert code == 2 and len(told(err)) == 1
    assert f"is in use by process {first.pid} on" in told(err)[0]
    complete(train_args(tmp_path / "run", corpus_dir, "--config.train.steps=2"))


@pytest.mark.slow
def test_local_checkpoints_are_taken_where_all_hosts_have_them(tmp_path, corpus_dir):
    """A kill after a local save and before a durable one; then a host loses its own."""
    options = [
        *SMALL,
        "--config.checkpoint.every=1000",
        "--config.checkpoint.local_every=2",
        f"--config.checkpoint.local_dir={tmp_path / 'local'}",
    ]
    workdir, calm = tmp_path / "run", tmp_path / "calm"
    complete(train_args(calm, corpus_dir, *SMALL, "--config.train.steps=9"))
    args = train_args(workdir, corpus_dir, *options, "--config.train.steps=100000")
    process = start(args)
    wait_for_step(process, workdir, 7)
    process.kill()
    process.communicate()

    few = train_args(workdir, corpus_dir, *options, "--config.train.steps=9")
    kept = sorted(int(p.name) for p in (tmp_path / "local").glob("*/0-of-1/[0-9]*"))
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "local", damaged)
    shutil.copytree(workdir, tmp_path / "copy")
    out = complete(few)

    assert len(kept) == 2 and f"continues after step {kept[-1]}" in out
    assert hashes(workdir)[:9] == hashes(calm)
    assert losses(workdir)[:9].tolist() == losses(calm).tolist()
    run = json.loads((workdir / "run.json").read_text())
    assert run["goodput"]["seconds"]["lost"] > 0 and len(run["runs"]) == 2

    victim = next(damaged.glob(f"*/0-of-1/{kept[-1]}/shards"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    shutil.rmtree(tmp_path / "local")
    damaged.rename(tmp_path / "local")
    args = train_args(tmp_path / "copy", corpus_dir, *options)
    again = complete([*args, "--config.train.steps=9"])
    assert f"continues after step {kept[0]}" in again
    assert losses(tmp_path / "copy").tolist() == losses(calm).tolist()


def test_a_local_checkpoint_that_one_host_lost_is_taken_by_none(tmp_path, corpus_dir):
    workdir, local = tmp_path / "run", tmp_path / "local"
    args = train_args(
        workdir,
        corpus_dir,
        *SMALL,
        *mesh_options((1, 2, 1, 1)),
        "--config.train.steps=9",
        "--config.checkpoint.local_every=2",
        f"--config.checkpoint.local_dir={local}",
    )
    complete_hosts(args, 2)
    before = losses(workdir).tolist()
    kept = [sorted(p.name for p in local.glob(f"*/{i}-of-2/[0-9]*")) for i in (0, 1)]
    shutil.rmtree(workdir / "checkpoints" / "9")
    (lost,) = local.glob("*/1-of-2/8")
    shutil.rmtree(lost)

    out = complete_hosts(args, 2)

    assert kept == [["6", "8"], ["6", "8"]]
    assert "continues after step 6" in out
    assert losses(workdir).tolist() == before


@pytest.mark.slow
def test_a_restart_with_a_warm_cache_compiles_nothing(tmp_path, corpus_dir):
    """Counted by JAX's own events, up to its first new step."""
    program = (
        "import jax, sys\n"
        "from mtp_jax import __main__\n"
        "missed = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: missed.append(event)"
        " if event == '/jax/compilation_cache/cache_misses' else None)\n"
        "code = __main__.main()\n"
        "print('misses', len(missed))\n"
        "sys.exit(code)\n"
    )
    cache = f"--config.train.compilation_cache={tmp_path / 'cache'}"
    args = train_args(tmp_path / "run", corpus_dir, cache, "--config.eval.every=0")

    found = [
        complete([*args, f"--config.train.steps={steps}"], program=counting)
        for steps in (2, 4, 6)
        for counting in [(sys.executable, "-c", program)]
    ]

    misses = [int(out.rpartition("misses ")[2]) for out in found]
    assert misses[0] > 0  # the count counts
    assert misses[2] == 0  # the second restart has all that the first one made


def test_gradients_that_are_not_finite_on_one_host_skip_the_step_on_all():
    address = f"127.0.0.1:{free_port()}"
    worker = (sys.executable, str(ROOT / "tests" / "poisoned_worker.py"))

    results = finish_hosts([start([address, i], program=worker) for i in range(2)])

    for code, out, err in results:
        assert code == 0 and "bad 1 same True" in out, (out, err[-2000:])


@pytest.fixture
def pods(request):
    if not request.config.getoption("--pods"):
        pytest.skip("takes an hour; --pods")


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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_four_two_and_eight_processes_are_one_run(pods, tmp_path, two_corpora):
    sources = two_corpora[0].partition("=")[2]
    calm, moved = tmp_path / "calm", tmp_path / "moved"
    options = [*two_corpora[1:], "--config.checkpoint.every=1000"]
    options.append("--config.train.steps=60")
    complete(train_args(calm, sources, *options), devices=8)

    args = train_args(moved, sources, *options)
    for count, step in ((1, 10), (4, 25), (2, 40)):
        hosts = start_hosts(args, count, devices=8 // count)
        wait_for_step(hosts[0], moved, step, timeout_s=900)
        hosts[-1].send_signal(signal.SIGTERM)
        stopped = finish_hosts(hosts, timeout_s=900)
        assert [code for code, *_ in stopped] == [0] * count, stopped
        assert len(records(moved)) < 60
    complete_hosts(args, 8, devices=1, timeout_s=900)

    assert hashes(moved) == hashes(calm)
    np.testing.assert_allclose(losses(moved), losses(calm), rtol=1e-4)
    assert audited(moved)["steps"] == 60
