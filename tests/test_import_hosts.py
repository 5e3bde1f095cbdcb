"""Imports by several processes: one workdir, as by one, and errors of one end all."""

import json
import os
import pathlib
import shutil
import socket
import sys

import foreign
import jax
import numpy as np
import pytest
from models import mesh_of
from runs import (
    ROOT,
    complete,
    complete_hosts,
    finish,
    finish_hosts,
    free_port,
    start,
    told,
)
from test_import import CONFIGS

from mtp_jax.checkpoint.checkpoints import Checkpoints
from mtp_jax.checkpoint.restore import restore_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORKER = (sys.executable, str(ROOT / "tests" / "verb_worker.py"))
NAME = socket.gethostname()


def saved(workdir):
    """The config, tokenizer and sums of all bits of a checkpoint of step 0."""
    checkpoints = Checkpoints(workdir)
    found = checkpoints.saved_metadata(0)
    checkpoints.close()
    return found


def params_of(workdir):
    return jax.device_get(restore_model(workdir, mesh=mesh_of()).params)


def report_of(workdir):
    """`import.json` without what depends on the order of sums."""
    found = json.loads((workdir / "import.json").read_text())
    assert found.pop("largest_difference") < 1e-4
    return found


def files_of(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def lines_of(out, folder):
    """Lines of the report that are alike; a library's may stand before, torn apart."""
    lines = out.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(f"{folder}: ")]
    return lines[starts[0] : -2]  # without differences of logits, and the workdir


def folder_of(path, name="qwen3", shards=3, seed=0):
    """A sharded model of Hugging Face."""
    config = CONFIGS[name]
    return foreign.write_folder(path, config, foreign.tensors_of(config, seed), shards)


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_two_hosts_write_the_workdir_that_one_writes(name, tmp_path):
    folder = folder_of(tmp_path / "hf", name)
    command = ["import", f"--from={folder}", "--tokenizer=bytes", "--workdir"]

    out = complete([*command, tmp_path / "one"], devices=4)
    told_by_first = complete_hosts([*command, tmp_path / "two"], 2, devices=2)

    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert one == two and one["checksums"]["params"]
    found = [params_of(tmp_path / name) for name in ("one", "two")]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert report_of(tmp_path / "one") == report_of(tmp_path / "two")
    assert len(report_of(tmp_path / "two")["sha256"]) == 3
    assert lines_of(out, folder) == lines_of(told_by_first, folder)
    assert len(lines_of(out, folder)) == 4
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run["device"]["processes"] == 2
    small = {x for x in files_of(tmp_path / "two") if len(x.parts) == 1}
    of_one = {x for x in files_of(tmp_path / "one") if len(x.parts) == 1}
    assert small == of_one | {pathlib.Path(".secret")}  # by which hosts know each other
    assert set(os.listdir(tmp_path)) == {"hf", "one", "two"}


def begun(folders, deeds, options, devices=2):
    """A host in each folder that does something of its own, begun."""
    address = f"127.0.0.1:{free_port()}"
    return [
        start(
            [
                folder,
                deed,
                *options,
                f"--coordinator={address}",
                f"--num_processes={len(folders)}",
                f"--process_id={i}",
            ],
            program=WORKER,
            devices=devices,
        )
        for i, (folder, deed) in enumerate(zip(folders, deeds, strict=True))
    ]


def ended(tmp_path, change=None, deeds=("", ""), **options):
    """Results of two hosts with a model each, of which the second one is changed."""
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host in hosts:
        folder_of(host / "hf")
    if change is not None:
        change(hosts[1] / "hf")
    command = [
        "import", "--from=hf", "--tokenizer=bytes", f"--workdir={tmp_path / 'run'}"
    ]  # fmt: skip
    return finish_hosts(begun(hosts, deeds, command, **options))


def test_a_host_reads_its_part_of_each_matrix(tmp_path):
    results = ended(tmp_path)

    size = sum(x.stat().st_size for x in (tmp_path / "a" / "hf").glob("*.safetensors"))
    found = [int(out.split()[-1]) for _, out, _ in results]
    assert [code for code, *_ in results] == [0, 0], results
    assert "used:" not in results[1][1]  # process 0 alone tells of the model
    # Besides the scales of norms, which every device has, a half.
    assert 0.4 * size < found[1] < 0.6 * size
    # The first one reads all once more, to compare.
    assert 1.3 * size < found[0] < 1.7 * size


def cut(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose(folder):
    shutil.rmtree(folder)


def another(folder):
    shutil.rmtree(folder)
    folder_of(folder, "mistral")


def other_values(folder):
    shutil.rmtree(folder)
    folder_of(folder, seed=1)


REFUSED = {
    "a shard that is cut": (cut, "", 2, "model-00002-of-00003.safetensors is damaged"),
    "no files": (lose, "", 2, "there is no such folder or file"),
    "another model": (another, "", 2, f"is another model on host 1 ({NAME}) than on"),
    "other values": (other_values, "", 1, "says something else than the file"),
    "no room": (None, "no room", 2, "no room on this host"),
    "killed": (None, "killed", 1, f"host 1 ({NAME}) is lost: its process ended"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_on_one_host_ends_all_and_leaves_nothing(name, tmp_path):
    change, deed, code, line = REFUSED[name]

    results = ended(tmp_path, change, ("", deed), devices=1)

    for i, (found, _, err) in enumerate(results):
        if deed == "killed" and i == 1:
            continue
        assert found == code, err[-3000:]
        assert len(told(err)) == 1 and line in told(err)[0]
        assert "Traceback" not in err
    assert set(os.listdir(tmp_path)) == {"a", "b"}


def test_hosts_with_other_options_are_refused(tmp_path):
    folder = folder_of(tmp_path / "hf")
    command = ["import", f"--from={folder}", "--tokenizer=bytes"]
    command.append(f"--workdir={tmp_path / 'run'}")
    address = f"--coordinator=127.0.0.1:{free_port()}"
    hosts = [
        start([*command, f"--seq_len={16 + i}", address, "--num_processes=2", *place])
        for i, place in enumerate((["--process_id=0"], ["--process_id=1"]))
    ]

    results = finish_hosts(hosts)

    for code, _, err in results:
        assert code == 2 and len(told(err)) == 1
        assert "the hosts differ in arguments" in told(err)[0]
    assert set(os.listdir(tmp_path)) == {"hf"}


def test_a_host_that_does_not_come_is_waited_for_as_long_as_is_asked(tmp_path):
    folder = folder_of(tmp_path / "hf")
    command = ["import", f"--from={folder}", f"--workdir={tmp_path / 'run'}"]
    alone = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    waits = "--config.train.join_timeout_s=2"

    code, _, err = finish(start([*command, *alone, "--process_id=0", waits]), 120)

    assert code == 1 and len(told(err)) == 1
    assert "host 1 of 2 did not come within 2 s" in told(err)[0]
    assert set(os.listdir(tmp_path)) == {"hf"}


def test_what_a_killed_import_left_is_no_hindrance(tmp_path):
    folder = folder_of(tmp_path / "hf")
    left = tmp_path / ".run.part"
    (left / "checkpoints" / "7").mkdir(parents=True)
    (left / "tokenizer.json").write_text("{")
    command = ["import", f"--from={folder}", "--tokenizer=bytes"]

    complete_hosts([*command, f"--workdir={tmp_path / 'run'}"], 2)

    assert os.listdir(tmp_path / "run" / "checkpoints") == ["0"]
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    assert set(os.listdir(tmp_path)) == {"hf", "run"}
