"""The verb `evaluate` with --tasks, --reference and --compare."""

import shutil
import sys

import pytest
from task_files import task_files
from test_evaluate_files import OLD_RUN
from test_sandbox import working_sandbox
from test_task_run import model

from mtp_jax import __main__
from mtp_jax.checkpoint.restore import restore_model
from mtp_jax.errors import UserError
from mtp_jax.eval.task_run import evaluate_tasks
from mtp_jax.sandbox import bubblewrap


@pytest.fixture
def data(tmp_path):
    return task_files(tmp_path / "data")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a few steps, to write into."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(OLD_RUN, folder)
    return folder


@pytest.fixture
def program(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mtp-jax", "evaluate", *map(str, args)])
        code = __main__.main()
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_the_command_measures_writes_and_compares(workdir, data, program, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(workdir, other)

    for folder in (workdir, other):
        code, out, err = program(
            f"--workdir={folder}", "--tasks=piqa,triviaqa", f"--data={data}",
            "--limit=3", "--max_new_tokens=4",
        )  # fmt: skip
        assert code == 0, err
    code, table, _ = program("--compare", workdir, other)

    assert "piqa  acc  " in out and "written to" in out
    names = {path.name for path in (workdir / "eval").iterdir()}
    assert names == {
        "piqa-limit3.json",
        "triviaqa-limit3-max_new_tokens4.json",
    }
    assert code == 0 and "+0.0000 [+0.0000, +0.0000]" in table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks=piqua"], ["--tasks=piqua is unknown", "piqa"]),
        (["--tasks=copa"], ["has no file of copa"]),
        (["--tasks=piqa", "--k=3"], ["--k is of no use to piqa"]),
        (["--tasks=mbpp", "--k=3", "--shots=0"], ["--k=3 is more than --samples=1"]),
        (["--tasks=mbpp"], ["the problems with task_id 2, 3 and 4"]),
        (["--tasks=mbpp", "--samples=x"], ["'x' is not a whole number"]),
        (["--tasks=mbpp", "--temperature=-1"], ["no list of different numbers"]),
        (["--tasks=mbpp", "--top_p=0"], ["is not above 0 and at most 1"]),
        (["--tasks=piqa", "--max_batches=1"], ["--max_batches is for held-out"]),
        (["--tasks=piqa", "--allow_unsafe_execution"], ["no program is run"]),
        (["--tasks=piqa", "--reference"], ["has no solutions of piqa"]),
        (["--tasks="], ["no task is named"]),
        (["--limit=3"], ["--limit is for benchmarks"]),
        (["--tasks=triviaqa", "--decoder=no"], ["--decoder=no is unknown"]),
    ],
)
def test_bad_input_is_one_line(workdir, data, program, options, words):
    code, _, err = program(f"--workdir={workdir}", f"--data={data}", *options)

    assert code == 2
    assert len(err.splitlines()) == 1 and err.startswith("mtp-jax: error: ")
    for word in words:
        assert word in err


def test_what_belongs_together_is_asked_for(workdir, tmp_path, program, data):
    for args, word in [
        ([f"--data={data}"], "needs --workdir=D"),
        ([f"--workdir={workdir}", "--tasks=piqa"], "needs --data=FILE_OR_FOLDER"),
        (["--compare", workdir], "two runs or more"),
        (["--compare", workdir, tmp_path], "has no results of tasks"),
        (["--compare", workdir, workdir, "--tasks=piqa"], "give no --workdir, --tasks"),
    ]:
        code, _, err = program(*args)
        assert code == 2 and word in err, err


def test_programs_need_a_sandbox(workdir, data, program, monkeypatch):
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: None)
    args = [f"--data={data}", "--tasks=mbpp", "--shots=0", "--limit=1"]

    code, _, err = program(f"--workdir={workdir}", *args)

    assert code == 2 and "apt install bubblewrap" in err and len(err.splitlines()) == 1
    code, out, _ = program(*args, "--reference", "--allow_unsafe_execution")
    assert code == 0 and "1 of 1 solutions pass" in out


def test_solutions_of_the_data_are_judged(data, program):
    working_sandbox(None)
    path = data / "mbpp.jsonl"
    path.write_text(path.read_text().replace("return x", "return x + 1", 1))

    code, out, err = program(
        "--tasks=mbpp", f"--data={path}", "--shots=0", "--reference"
    )

    assert code == 1
    assert "mbpp 11: AssertionError" in out and "mbpp: 4 of 5 solutions pass" in out
    assert "1 solutions of the data do not pass" in err


def test_a_folder_is_needed_for_a_restored_model(data):
    with pytest.raises(UserError, match="give folder="):
        evaluate_tasks(model(), ["piqa"], data)


def test_a_workdir_is_enough(workdir, data):
    found = evaluate_tasks(workdir, ["piqa"], data)["piqa"]

    assert (workdir / "eval" / "piqa.json").is_file()
    assert found["settings"]["step"] == restore_model(workdir).step
