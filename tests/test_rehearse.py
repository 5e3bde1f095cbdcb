"""The rehearsal: what it scales, what it notices, and a small one for real."""

import dataclasses
import json
import math
import shutil
import tempfile

import pytest
from models import tiny_config
from runs import CACHE, ROOT, finish, start

from mtp_jax.cli import rehearse as verb
from mtp_jax.cli.args import config_from
from mtp_jax.config import Config, MeshConfig
from mtp_jax.errors import UserError
from mtp_jax.rehearsal import rehearsal
from mtp_jax.rehearsal.faults import FAULTS, Outcome, _judged, host_counts
from mtp_jax.rehearsal.processes import HostGroup
from mtp_jax.rehearsal.scale import differences, scale_down, scaled_mesh
from mtp_jax.rehearsal.storm import Broken, Storm

COUNTS = (8, 4, 2, 16)
MESHES = [
    {},
    {"replica": 2, "tensor": 4},
    {"replica": -1, "fsdp": 16, "tensor": 8},
    {"replica": 1, "fsdp": 3},
]


def shape(mesh):
    return dataclasses.asdict(mesh)


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8, 16])
def test_a_scaled_mesh_has_the_devices_and_no_new_axis(axes, devices):
    wanted = MeshConfig(**axes)

    found = shape(scaled_mesh(wanted, devices))

    assert math.prod(found.values()) == devices
    grown = {name for name, size in found.items() if size > 1}
    assert grown <= {name for name, size in shape(wanted).items() if size != 1}


def test_with_enough_devices_every_axis_is_split():
    found = scaled_mesh(MeshConfig(replica=2, fsdp=-1, tensor=4), 8)

    assert (found.replica, found.fsdp, found.tensor) == (2, 2, 2)


@pytest.mark.parametrize("axes", MESHES[:3])
@pytest.mark.parametrize("name", ["paper.py:7b-n4", "llama.py:8b-n2", "tiny.py"])
def test_a_scaled_config_keeps_the_structure_and_splits_evenly(name, axes):
    cfg = config_from(f"{ROOT}/configs/{name}", [])
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(**axes))

    small = scale_down(cfg, ["a"], 511, COUNTS)

    model, before = small.model, cfg.model
    assert model.n_future_tokens == before.n_future_tokens
    grouped = before.num_query_heads > before.num_kv_heads
    assert (model.num_query_heads > model.num_kv_heads) == grouped
    assert model.compute_dtype == before.compute_dtype
    assert small.train.accumulation == cfg.train.accumulation
    for devices in COUNTS:
        mesh = shape(scaled_mesh(cfg.mesh, devices))
        rows = small.data.batch_size // small.train.accumulation
        split = math.prod(mesh.values()) // mesh["tensor"]
        assert rows % split == model.d_model % split == 0
        for size in (model.num_kv_heads, model.d_ff, model.vocab_size):
            assert size % mesh["tensor"] == 0
    assert model.vocab_size >= 511
    assert any("d_model" in line for line in differences(cfg, small))


def test_too_many_devices_for_a_machine_are_refused():
    with pytest.raises(UserError, match="--hosts"):
        scale_down(tiny_config(), ["a"], 32, [128])


def test_a_script_is_decided_by_its_seed_and_has_every_fault():
    names = [fault.name for fault in rehearsal._script((), 2 * len(FAULTS), 3)]

    again = [fault.name for fault in rehearsal._script((), 2 * len(FAULTS), 3)]
    other = [fault.name for fault in rehearsal._script((), 2 * len(FAULTS), 4)]

    assert names == again != other
    assert sorted(names) == sorted(2 * [fault.name for fault in FAULTS])


def test_a_fault_that_does_not_exist_is_told():
    with pytest.raises(UserError, match="kill_one"):
        rehearsal._script(["kill"], None, 0)


def test_a_folder_that_cannot_be_made_is_told():
    with pytest.raises(UserError, match="--workdir=/proc/x cannot be written"):
        rehearsal._folder("/proc/x").__enter__()


def test_resumes_go_to_fewer_and_to_more_hosts():
    assert host_counts(4) == [4, 2, 1, 8]
    assert host_counts(2) == [2, 1, 4]


@pytest.mark.parametrize(
    ("codes", "lines", "options", "wrong"),
    [
        ({0: 0, 1: 0}, ["told to stop: x"], {"well": True}, ""),
        ({0: 0, 1: 1}, [], {"well": True}, "exit codes"),
        ({0: 1, 1: -9}, ["host 1 is lost"], {"well": False, "lost": [1]}, ""),
        ({0: 0, 1: -9}, ["host 1 is lost"], {"well": False, "lost": [1]}, "exit codes"),
        ({0: None, 1: -9}, ["host 1"], {"well": False, "lost": [1]}, "had not ended"),
        ({0: 1, 1: -9}, ["it broke"], {"well": False, "names": ["host 1"]}, "nobody"),
    ],
)
def test_an_end_that_is_not_as_it_had_to_be_is_noticed(codes, lines, options, wrong):
    found = _judged(codes, 1.0, lines, **options).wrong

    assert bool(found) == bool(wrong) and wrong in found


def test_other_batches_are_noticed(capsys, tmp_path):
    calm = ("a", "b", "c")
    result = rehearsal.FaultResult
    rows = (
        result("kill_one", Outcome("host 1 is lost", 2.0), "", ("a", "b")),
        result("kill_all", Outcome("", 2.0), "", ("a", "x", "c")),
        result("stop_all", Outcome("", 2.0), "began after step 1", ("a",)),
        result("full_disk", Outcome("", 2.0, "nobody said"), "", ("a",)),
    )
    good = rehearsal.Rehearsal(rows[:1], calm, tmp_path, 1.0)
    bad = rehearsal.Rehearsal(rows, calm, tmp_path, 1.0)

    assert good.held and not bad.held
    assert [row.held(calm) for row in rows] == [True, False, False, False]
    verb._print_table(good)
    assert "1 of 1 held; 2 steps, the hashes of 3" in capsys.readouterr().out
    verb._print_table(bad)
    assert "1 of 4 held" in capsys.readouterr().out


class Fake(Storm):
    """A storm without processes; each start brings two new steps."""

    closed = 0

    def up(self, hosts=None, overrides=()):
        self.group = HostGroup.__new__(HostGroup)
        self.workdir.mkdir(exist_ok=True)
        with (self.workdir / "metrics.jsonl").open("a") as file:
            for step in (self.step() + 1, self.step() + 2):
                file.write(json.dumps({"step": step, "batch_hash": f"h{step}"}) + "\n")
        return self.group

    def close(self):
        self.group = None
        Fake.closed += 1


@pytest.fixture
def fake(monkeypatch):
    """Rehearsals without processes; gives a function that sets how faults end."""
    monkeypatch.setattr(rehearsal, "Storm", Fake)
    monkeypatch.setattr(Fake, "closed", 0)
    reference = [f"h{step}" for step in range(1, 100)]
    monkeypatch.setattr(rehearsal, "_calm_run", lambda storm, folder: reference)

    def ends(inject):
        faults = [dataclasses.replace(fault, inject=inject) for fault in FAULTS]
        monkeypatch.setattr(rehearsal, "FAULTS", faults)

    return ends


def rehearsed(**options):
    """A rehearsal of the tiny config, and the lines of its report."""
    lines = []
    cfg = config_from(f"{ROOT}/configs/tiny.py", [])
    return rehearsal.rehearse(cfg, hosts=2, report=lines.append, **options), lines


def test_a_rehearsal_from_python_gives_rows_and_a_report(fake, tmp_path):
    fake(lambda storm: Outcome("told to stop", 1.5))

    result, lines = rehearsed(only=["stop_all", "kill_one"], workdir=tmp_path / "r")

    assert result.held and not result.broken
    assert [row.fault for row in result.rows] == ["stop_all", "kill_one"]
    assert [len(row.hashes) for row in result.rows] == [4, 6]
    assert result.folder == tmp_path / "r" and (tmp_path / "r" / "config.py").exists()
    assert lines[-2:] == ["stop_all: told to stop", "kill_one: told to stop"]
    assert any(line.startswith("scaled  model: ") for line in lines)


def test_a_temporary_folder_is_kept_if_anything_did_not_hold(fake):
    fake(lambda storm: Outcome("", 1.5))
    good, _ = rehearsed(only=["stop_all"])
    fake(lambda storm: Outcome("", 1.5, "it did not end"))
    bad, _ = rehearsed(only=["stop_all"])

    assert good.held and not good.folder.exists()
    assert not bad.held and bad.folder.is_dir()
    shutil.rmtree(bad.folder)


def test_a_rehearsal_that_breaks_off_says_why(fake, tmp_path, monkeypatch, capsys):
    def calm(storm, folder):
        raise Broken("the run without faults ended")

    fake(lambda storm: Outcome("", 1.5))
    monkeypatch.setattr(rehearsal, "_calm_run", calm)

    result, _ = rehearsed(only=["stop_all"], workdir=tmp_path / "r")
    options = ["--hosts=2", "--only=stop_all", f"--workdir={tmp_path / 'v'}"]
    code = verb.main([f"--config={ROOT}/configs/tiny.py", *options])

    assert not result.held and result.broken == "the run without faults ended"
    assert len(result.rows) == 1 and code == 1
    last = capsys.readouterr().out.splitlines()[-1]
    logs = tmp_path / "v" / "logs"
    assert last == f"mtp-jax rehearse: {result.broken}; the logs are in {logs}"


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("too large")])
def test_an_interrupted_rehearsal_ends_its_hosts_and_leaves_no_temporary_folder(
    fake, tmp_path, monkeypatch, error
):
    def interrupted(storm):
        assert storm.workdir.parent.is_dir()
        raise error

    fake(interrupted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with pytest.raises(error if error is KeyboardInterrupt else UserError):
        rehearsed(only=["stop_all"])

    assert Fake.closed == 1 and list(tmp_path.iterdir()) == []
    with pytest.raises(error if error is KeyboardInterrupt else UserError):
        rehearsed(only=["stop_all"], workdir=tmp_path / "r")
    assert (tmp_path / "r" / "config.py").is_file()


def test_arguments_that_no_pod_has_are_refused(tmp_path):
    cfg = tiny_config()
    for options, match in (
        ({"hosts": 1}, "--hosts=1; a pod has at least 2"),
        ({"devices_per_host": 0}, "above 0"),
        ({"faults": 0}, "above 0"),
        ({"only": ["kill"]}, "no such fault"),
    ):
        with pytest.raises(UserError, match=match):
            rehearsal.rehearse(cfg, workdir=tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_a_written_config_is_the_config(tmp_path):
    cfg = scale_down(Config(), ["a", "b"], 300, [2])

    path = rehearsal._write_config(cfg, tmp_path)

    assert config_from(str(path), []) == cfg


def test_hosts_that_hang_are_ended_and_told(tmp_path, monkeypatch):
    fake = tmp_path / "mtp_jax"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text("import time; time.sleep(100)")
    monkeypatch.chdir(tmp_path)  # where Python looks first for what it is to run
    monkeypatch.setattr(
        "mtp_jax.rehearsal.processes.__file__", str(fake / "rehearsal" / "x.py")
    )

    hosts = HostGroup(["train"], hosts=2, devices=1, logs=tmp_path / "logs")
    codes, _ = hosts.wait(0.5)

    assert codes == {0: None, 1: None}
    assert all(code == -9 for code in hosts.codes().values())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_rehearsal(tmp_path, rehearsals):
    """By default the faults that differ most; --rehearsals=30: the whole script."""
    some = ["kill_while_saving", "damage_newest", "stop_one"]
    script = (
        [f"--faults={rehearsals}", "--hosts=4", "--devices-per-host=2"]
        if rehearsals
        else [*(f"--only={name}" for name in some), "--hosts=2", "--devices-per-host=1"]
    )
    script.append(f"--config.train.compilation_cache={CACHE}")
    config = ROOT / "configs" / "tiny.py"

    process = start(
        ["rehearse", f"--config={config}", f"--workdir={tmp_path / 'r'}", *script]
    )
    code, out, err = finish(process, timeout_s=7200 if rehearsals else 600)

    expected = rehearsals or len(some)
    assert code == 0, out[-4000:] + err[-2000:]
    assert f"{expected} of {expected} held" in out
