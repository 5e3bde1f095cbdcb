"""Benchmarks in real processes: killed at random, and the data's own solutions."""

import json
import random
import shutil
import time

import pytest
from runs import SHARED, complete, finish, start
from task_files import task_files
from test_evaluate_files import OLD_RUN
from test_sandbox import working_sandbox

from mtp_jax.eval.task_data import TaskSettings, load_task
from mtp_jax.eval.tasks import TASKS

pytestmark = pytest.mark.slow
NAME = "mbpp-samples20-shots0-max_new_tokens8-blockwise"


def results_so_far(workdir):
    path = workdir / "eval" / f"{NAME}.partial.jsonl"
    return len(path.read_text().split("\n")) - 2 if path.exists() else 0


@pytest.mark.timeout(900)
def test_a_killed_measurement_goes_on_to_the_same_result(tmp_path, kills):
    working_sandbox(None)
    data = task_files(tmp_path / "data")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for workdir in (whole, cut):
        shutil.copytree(OLD_RUN, workdir)
    options = [
        f"--data={data}", "--tasks=mbpp", "--shots=0", "--samples=20", "--k=1,10",
        "--max_new_tokens=8", "--batch_size=4", "--decoder=blockwise",
    ]  # fmt: skip
    complete(["evaluate", f"--workdir={whole}", *options])
    rng, done = random.Random(0), 0

    for _ in range(kills):
        process = start(["evaluate", f"--workdir={cut}", *options])
        while results_so_far(cut) <= done and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        done = results_so_far(cut)
    out = complete(["evaluate", f"--workdir={cut}", *options])

    assert "mbpp goes on after" in out or "is there already" in out
    a, b = (
        json.loads((workdir / "eval" / f"{NAME}.json").read_text())
        for workdir in (whole, cut)
    )
    assert a == b
    assert len(a["items"]) == 5 and len(a["items"][0]["results"]) == 20
    assert set(a["metrics"]) == {"pass@1", "pass@10"}


def test_two_measurements_of_one_file_are_refused(tmp_path):
    working_sandbox(None)
    data = task_files(tmp_path / "data")
    workdir = tmp_path / "run"
    shutil.copytree(OLD_RUN, workdir)
    options = [f"--workdir={workdir}", f"--data={data}", "--tasks=mbpp", "--shots=0",
               "--samples=400", "--batch_size=4"]  # fmt: skip
    first = start(["evaluate", *options])
    while not list((workdir / "eval").glob("*.partial.jsonl")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)

    code, _, err = finish(start(["evaluate", *options]))
    first.kill()
    first.communicate()

    assert code == 2 and "is being written by another process" in err


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("task", "count", "impossible"),
    [("humaneval", 164, []), ("mbpp", 464, ["927"])],  # 367 is not in this file
)
def test_reference_solutions_pass_and_wrong_ones_do_not(task, count, impossible):
    if not (SHARED / task).is_dir():
        pytest.skip(f"{SHARED / task} is not there")
    sandbox = working_sandbox(None)
    data = load_task(TASKS[task], str(SHARED / task), TaskSettings())

    found = sandbox.run_all([x.program(x.reference) for x in data.examples])

    assert len(found) == count
    failed = [n for n, v in zip(data.numbers, found, strict=True) if not v.passed]
    assert failed == impossible
    wrong = [x.program(wrong_body(x)) for x in data.examples]
    assert not any(verdict.passed for verdict in sandbox.run_all(wrong))


def wrong_body(problem):
    """A completion that defines what is asked for, and does nothing."""
    names = problem.program("").tests.names
    if problem.prompt.rstrip().endswith("[BEGIN]"):
        return "\n".join(f"def {name}(*a, **k): pass" for name in names)
    return "    pass\n"
