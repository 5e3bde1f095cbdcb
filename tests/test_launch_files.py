"""The launch files: what their tools, and the schemas of these, say of them."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml
from test_launch import JOBSETS, LAUNCH, SKYPILOT, SLURM, train_pod

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
WORDS = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 1}


def strict(required, **properties):
    """A JSON schema of an object that has no other fields."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


# jobset.x-k8s.io/v1alpha2, the fields that the launch files use.
JOBSET_SCHEMA = strict(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=strict(
        ["name"],
        name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
        annotations=strict(
            [],
            **{
                "alpha.jobset.sigs.k8s.io/exclusive-topology": {
                    "const": "cloud.google.com/gke-nodepool"
                }
            },
        ),
    ),
    spec=strict(
        ["replicatedJobs", "failurePolicy"],
        failurePolicy=strict(
            ["maxRestarts"],
            maxRestarts=COUNT,
            rules={
                "type": "array",
                "items": strict(
                    ["name", "action"],
                    name=WORDS,
                    action={
                        "enum": [
                            "FailJobSet",
                            "RestartJobSet",
                            "RestartJobSetAndIgnoreMaxRestarts",
                        ]
                    },
                    onJobFailureReasons={
                        "type": "array",
                        "items": {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        },
                    },
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": strict(
                ["name", "replicas", "template"],
                name=WORDS,
                replicas=COUNT,
                template=strict(["spec"], spec={"type": "object"}),
            ),
        },
    ),
)
# The fields of a SkyPilot task that the launch file uses, as sky/utils/schemas.py and
# sky/task.py have them.
SKYPILOT_SCHEMA = strict(
    ["name", "num_nodes", "resources", "workdir", "setup", "run"],
    name=WORDS,
    num_nodes=COUNT,
    workdir=WORDS,
    setup=WORDS,
    run=WORDS,
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    file_mounts={
        "type": "object",
        "patternProperties": {
            "^/": strict(
                ["source", "mode"],
                source=WORDS,
                mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
            )
        },
        "additionalProperties": False,
    },
    resources=strict(
        ["accelerators"],
        accelerators={"type": "string", "pattern": r"^[A-Za-z0-9-]+:\d+$"},
        use_spot={"type": "boolean"},
        disk_size=COUNT,
        job_recovery=strict(
            [],
            strategy={"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
            max_restarts_on_errors=COUNT,
            recover_on_exit_codes={
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 255},
            },
        ),
    ),
)
# Options of sbatch that a script may ask for, and what their values look like.
SBATCH_OPTIONS = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+",
    "time": r"(\d+-)?\d+:\d\d:\d\d",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"\S+",
    "signal": r"(B:)?[A-Z0-9]+(@\d+)?",
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    program = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)

    done = subprocess.run([program, path], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_a_jobset_and_its_job_are_valid(path):
    jobset = yaml.safe_load(path.read_text())

    jsonschema.validate(jobset, JOBSET_SCHEMA)
    for job in jobset["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        whole |= job["template"]
        version = kubernetes_validate.latest_version()
        kubernetes_validate.validate(whole, version, strict=True)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_a_jobset_asks_for_the_hosts_of_its_slices(path):
    job, pod, container = train_pod(path)
    spec = job["template"]["spec"]

    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = 1
    for size in topology.split("x"):
        chips *= int(size)
    here = container["resources"]["limits"]["google.com/tpu"]

    assert container["resources"]["requests"]["google.com/tpu"] == here
    assert spec["parallelism"] == spec["completions"] == chips // here
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0  # the JobSet starts all of them again, or none
    told = {word for word in container["command"] if "mesh.replica" in word}
    replicas = job["replicas"]
    assert told == ({f"--config.mesh.replica={replicas}"} if replicas > 1 else set())


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_a_preempted_jobset_starts_again_without_counting_it(path):
    jobset = yaml.safe_load(path.read_text())
    job, pod, container = train_pod(path)

    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    (again,) = jobset["spec"]["failurePolicy"]["rules"]

    assert {"containerName": "train", "operator": "In", "values": [75]} in [
        rule.get("onExitCodes") for rule in rules
    ]
    assert again["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert again["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert container["command"][0] == "launch/stoppable.sh"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert pod["restartPolicy"] == "Never"


def test_slurm_options_exist():
    lines = SLURM.read_text().splitlines()

    asked = [line.removeprefix("#SBATCH ") for line in lines if "#SBATCH" in line]
    told = {name: value for name, _, value in (x[2:].partition("=") for x in asked)}

    assert all(x.startswith("--") for x in asked)
    assert lines.index(f"#SBATCH {asked[-1]}") == len(asked)  # before any command
    for name, value in told.items():
        assert re.fullmatch(SBATCH_OPTIONS[name], value), name
    assert "requeue" in told and int(told["signal"].partition("@")[2]) >= 60


def test_the_skypilot_task_is_valid():
    task = yaml.safe_load(SKYPILOT.read_text())

    jsonschema.validate(task, SKYPILOT_SCHEMA)
    assert 75 in task["resources"]["job_recovery"]["recover_on_exit_codes"]


def test_every_file_is_in_the_readme():
    text = (LAUNCH / "README.md").read_text()

    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in text
