"""Runs that go on after a stop, on other hosts, too: nothing is lost."""

import json
import shutil
import signal
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
    hashes,
    losses,
    mesh_options,
    records,
    start,
    start_hosts,
    told,
    train_args,
    wait_for_step,
)


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


@pytest.mark.slow
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


@pytest.mark.slow
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
