"""The launch files: the `train` that each starts, with stand-ins for its tools."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
import yaml
from runs import ROOT, records, wait_for_step

from mtp_jax.cli import train
from mtp_jax.errors import UserError

LAUNCH = ROOT / "launch"
JOBSETS = sorted(LAUNCH.glob("gke_*.yaml"))
SKYPILOT = LAUNCH / "skypilot_gpu.yaml"
SLURM = LAUNCH / "slurm_gpu.sbatch"

# A stand-in for a program: it writes down its arguments, a line each, and ends.
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$@" >"$RECORDED"\n'


class Parsed(Exception):
    """What `train` made of its command line, before it did anything."""


def train_config(words, monkeypatch):
    """The config of `... python -m mtp_jax train ...`, by the parser of the verb."""
    assert words[:3] == ["-m", "mtp_jax", "train"]
    real = train.config_from

    def stop(path, overrides):
        raise Parsed(real(path, overrides))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "config_from", stop)
    with pytest.raises(Parsed) as caught:
        train.main(words[3:])
    return caught.value.args[0]


def programs(folder, *names):
    """A folder of stand-ins, for PATH."""
    folder.mkdir()
    for name in names:
        path = folder / name
        path.write_text(RECORDER)
        path.chmod(0o755)
    return folder


def shell(script, folder, recorded, *, cwd=ROOT, **environment):
    """Runs a program with stand-ins first in PATH; returns it and what one recorded."""
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "RECORDED": str(recorded),
        "HOME": str(folder),
        **environment,
    }
    done = subprocess.run(
        script, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    words = recorded.read_text().splitlines() if recorded.exists() else []
    return done, words


def train_pod(path):
    """The pod of the one job of a JobSet, and its training container."""
    (job,) = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_a_jobset_trains(path, tmp_path, monkeypatch):
    _, _, container = train_pod(path)
    stand_ins = programs(tmp_path / "bin", "python")

    done, words = shell(container["command"], stand_ins, tmp_path / "words")

    assert done.returncode == 0, done.stderr
    assert train_config(words, monkeypatch).model.n_future_tokens == 4


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_trains_and_queues_again_when_it_was_told_to_stop(
    code, tmp_path, monkeypatch
):
    stand_ins = programs(tmp_path / "bin", "scontrol")
    (stand_ins / "srun").write_text(
        f'#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"$@"\nexit {code}\n'
    )
    (stand_ins / "srun").chmod(0o755)
    project = tmp_path / "project"
    programs(tmp_path / "venv", "python")
    (project / ".venv").mkdir(parents=True)
    (tmp_path / "venv").rename(project / ".venv" / "bin")
    (project / "launch").symlink_to(LAUNCH)
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    done, words = shell(
        SLURM,
        stand_ins,
        tmp_path / "words",
        SLURM_SUBMIT_DIR=str(project),
        SLURM_JOB_ID="7",
    )

    assert done.returncode == code, done.stderr
    if code == 75:
        assert words == ["requeue", "7"]
    else:
        cfg = train_config(words, monkeypatch)
        assert cfg.data.sources == (f"{project}/data/mine",)


def test_skypilot_trains(tmp_path, monkeypatch):
    task = yaml.safe_load(SKYPILOT.read_text())
    project = tmp_path / "project"
    programs(tmp_path / "venv", "python")
    (project / ".venv").mkdir(parents=True)
    (tmp_path / "venv").rename(project / ".venv" / "bin")
    (project / "launch").symlink_to(LAUNCH)

    done, words = shell(
        ["bash", "-c", task["run"]],
        tmp_path,
        tmp_path / "words",
        cwd=project,
        BUCKET=task["envs"]["BUCKET"],
        SKYPILOT_NODE_IPS="10.0.0.5\n10.0.0.6",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_RANK="1",
    )

    assert done.returncode == 0, done.stderr
    joined = {"--coordinator=10.0.0.5:8476", "--num_processes=2", "--process_id=1"}
    assert joined <= set(words)
    assert train_config(words, monkeypatch).data.sources == ("/data/mine",)
    for line in task["setup"].splitlines():
        assert subprocess.run(["bash", "-nc", line]).returncode == 0


GCLOUD = """\
#!/bin/bash
printf '%s\\n' "$@" >>"$RECORDED"
echo "$4 $5" >>"$RECORDED.verbs"
for word in "$@"; do
    case $word in
    --metadata-from-file=*) cp "${word##*mtp-train=}" "$RECORDED.train" ;;
    esac
done
case $4 in
describe)
    head -n 1 "$RECORDED.states"
    sed -i 1d "$RECORDED.states"
    ;;
ssh)
    head -n 1 "$RECORDED.said"
    sed -i 1d "$RECORDED.said"
    ;;
esac
exit 0
"""


@pytest.mark.parametrize("slices", [1, 2])
def test_tpu_vms_train(slices, tmp_path, monkeypatch):
    stand_ins = programs(tmp_path / "bin", "gcloud")
    (stand_ins / "gcloud").write_text(GCLOUD)
    programs(tmp_path / "venv", "python")
    recorded = tmp_path / "words"
    options = [
        "--config=configs/paper.py:7b-n4",
        "--workdir=gs://my-bucket/runs/a run",
        "--config.data.sources=/data/mine",
    ]

    done, words = shell(
        [LAUNCH / "tpu_vm.sh", "create", *options],
        stand_ins,
        recorded,
        BUCKET="gs://my-bucket",
        ZONE="us-east5-b",
        TPU="v6e-16",
        SLICES=str(slices),
    )

    assert done.returncode == 0, done.stderr
    node = {1: "--node-id=mtp-jax", 2: "--node-count=2"}[slices]
    wanted = {node, "--spot", "--zone=us-east5-b", "--runtime-version=v2-alpha-tpuv6e"}
    assert wanted <= set(words)
    # The host's own script puts the options behind `python -m mtp_jax train`.
    line = next(
        line
        for line in (LAUNCH / "tpu_vm_host.sh").read_text().splitlines()
        if line.startswith("exec ")
    )
    handed = (tmp_path / "words.train").read_text()
    command = line.replace("$(metadata mtp-train)", handed)
    command = command.replace(".venv/bin/python", str(tmp_path / "venv" / "python"))
    _, words = shell(["bash", "-c", command], stand_ins, tmp_path / "train")
    assert "--workdir=gs://my-bucket/runs/a run" in words
    assert train_config(words, monkeypatch).data.sources == ("/data/mine",)


def test_tpu_vms_are_queued_again_until_training_is_done(tmp_path):
    stand_ins = programs(tmp_path / "bin", "gcloud", "sleep")
    (stand_ins / "gcloud").write_text(GCLOUD)
    (stand_ins / "sleep").write_text("#!/bin/sh\n")
    states = ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "NONE"]
    (tmp_path / "words.states").write_text("\n".join([*states, *["ACTIVE"] * 3, ""]))
    said = ["active step 5", "inactive told to stop", "", "inactive done: step 50"]
    (tmp_path / "words.said").write_text("\n".join([*said, ""]))

    done, _ = shell(
        [
            LAUNCH / "tpu_vm.sh",
            "keep",
            "--config=configs/tiny.py",
            "--workdir=gs://b/r",
        ],
        stand_ins,
        tmp_path / "words",
        BUCKET="gs://b",
        ZONE="us-east5-b",
        TPU="v6e-16",
    )

    verbs = (tmp_path / "words.verbs").read_text().splitlines()
    changes = [
        v.split()[0] for v in verbs if v.split()[0] in ("create", "delete", "ssh")
    ]
    assert done.returncode == 0, done.stderr
    # Asks, is taken away, is queued again, is started again, is done.
    assert changes == ["create", "ssh", "delete", "create", *["ssh"] * 3, "delete"]


def test_an_option_that_does_not_exist_is_noticed(monkeypatch):
    words = ["-m", "mtp_jax", "train", "--config=configs/tiny.py", "--workdir=x"]

    with pytest.raises(UserError, match="colour"):
        train_config([*words, "--config.train.colour=3"], monkeypatch)


def test_a_command_that_ends_by_itself_keeps_its_code():
    for code in (0, 1, 2):
        script = [LAUNCH / "stoppable.sh", "sh", "-c", f"exit {code}"]
        assert subprocess.run(script).returncode == code


def local(workdir, corpus, *more, hosts=4, wrapper=()):
    """The README's command for this machine, begun, on a corpus of the tests."""
    (line,) = {
        line
        for line in (LAUNCH / "README.md").read_text().splitlines()
        if line.startswith("launch/local.sh 4 ")
    }
    script, _, *options = shlex.split(line)
    options = [x for x in options if not x.startswith("--workdir")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.Popen(
        [
            *wrapper,
            ROOT / script,
            str(hosts),
            *options,
            f"--workdir={workdir}",
            f"--config.data.sources={corpus}",
            f"--config.train.compilation_cache={ROOT / '.pytest_cache' / 'jax'}",
            "--config.log.tensorboard=False",
            "--config.eval.every=0",
            "--config.log.every=1",
            *more,
        ],
        cwd=ROOT,
        env={**environment, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_four_local_hosts_stop_when_told_and_go_on(tmp_path, corpus_dir):
    workdir = tmp_path / "run"
    many = "--config.train.steps=100000"
    begun = local(workdir, corpus_dir, many, wrapper=[LAUNCH / "stoppable.sh"])
    wait_for_step(begun, workdir, 3)
    begun.send_signal(signal.SIGTERM)
    out, err = begun.communicate(timeout=120)
    told = records(workdir)[-1]["step"]

    few = f"--config.train.steps={told + 3}"
    ended = local(workdir, corpus_dir, few)
    more, worse = ended.communicate(timeout=240)

    assert begun.returncode == 75, err[-3000:]
    assert f"saved step {told}" in out
    assert ended.returncode == 0, worse[-3000:]
    assert f"continues after step {told}" in more
    assert [row["step"] for row in records(workdir)] == list(range(1, told + 4))
    run = json.loads((workdir / "run.json").read_text())
    assert run["device"]["processes"] == 4
