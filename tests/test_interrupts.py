"""Ctrl-C, SIGHUP and SIGTERM: one save, a clean end, and nothing left behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from runs import (
    ROOT,
    complete,
    finish,
    finish_hosts,
    free_port,
    newest_step,
    records,
    start,
    told,
    train_args,
    wait_for_step,
)
from test_hosts import NOTHING, begin, wait_for

from mtp_jax.distributed.lifetime import signals_held

MANY = "--config.train.steps=1000000"
RUN = ROOT / "tests" / "data" / "run_format_0" / "run"
# An export that gets a signal when it has written a file.
EXPORT = """
import os, sys, time
import mtp_jax.exporting.export
from mtp_jax.__main__ import program

number, *sys.argv = sys.argv[1:]

def write(parts, folder, length):
    (folder / "model.gguf").write_bytes(b"a part")
    os.kill(os.getpid(), int(number))
    time.sleep(60)

sys.modules["mtp_jax.exporting.export"].write_gguf = write
program()
"""

pytestmark = pytest.mark.slow  # real runs, in processes of their own


@pytest.fixture(autouse=True)
def signals_are_heard():
    """A shell's background job ignores Ctrl-C, and so would the processes here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_run_saves_once_and_says_how_to_go_on(number, tmp_path, corpus_dir):
    workdir = tmp_path / "run"
    process = start(train_args(workdir, corpus_dir, MANY))
    wait_for_step(process, workdir, 2)

    process.send_signal(number)
    code, out, err = finish(process, timeout_s=60)

    last = records(workdir)[-1]["step"]
    assert code == 0 and "Traceback" not in err
    assert f"saved step {last}; run the same command to go on" in out
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(last)]
    if number == signal.SIGINT:
        assert len(told(err)) == 1 and "Ctrl-C again" in told(err)[0]


def test_a_second_ctrl_c_ends_at_once():
    (process,) = begin(["steps 1000"])
    wait_for(process, "began")

    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    code, _, err = finish(process, timeout_s=10)

    assert code == 130 and told(err)[-1] == "mtp-jax: interrupted"


def test_a_repeated_sigterm_is_no_loss(tmp_path, corpus_dir):
    workdir = tmp_path / "run"
    process = start(train_args(workdir, corpus_dir, MANY))
    wait_for_step(process, workdir, 2)

    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    code, out, _ = finish(process)

    assert code == 0 and f"saved step {newest_step(workdir)}" in out


def test_a_signal_that_is_ignored_from_the_start_stays_so():
    """As SIGHUP under nohup, and Ctrl-C in a shell's background job."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        (process,) = begin(["steps 0.05"])
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(process, "began")

    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)

    assert process.poll() is None


def test_ctrl_c_ends_compiled_code_at_once(tmp_path, corpus_dir):
    """As `generate` runs it, the decoding of a text is one call."""
    workdir = tmp_path / "run"
    complete(train_args(workdir, corpus_dir, "--config.train.steps=2"))
    process = start(
        ["generate", f"--workdir={workdir}", "--prompt=def ", "--max_new_tokens=90000"]
    )
    # Said right before it begins to compile and to decode.
    assert "nonsense beyond" in process.stderr.readline()
    time.sleep(1)

    process.send_signal(signal.SIGINT)
    code, _, err = finish(process, timeout_s=10)

    assert (code, err) == (130, "mtp-jax: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_prepare_leaves_nothing_when_it_is_interrupted(number, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(f'{{"text": "{"x" * 1000}"}}\n' * 50_000)  # seconds of work
    output = tmp_path / "out"
    process = start(["prepare", f"--input={text}", f"--output={output}", "--workers=2"])
    (_, *workers) = wait_for_children(process, 3)  # and one that counts semaphores
    time.sleep(0.5)

    process.send_signal(number)
    code, _, err = finish(process, timeout_s=30)

    assert (code, told(err)) == (128 + number, ["mtp-jax: interrupted"])
    assert os.listdir(tmp_path) == ["text.jsonl"] and "Traceback" not in err
    assert gone(workers, within_s=5)


def test_a_signal_that_is_held_is_heard_at_the_end():
    done = []

    with pytest.raises(KeyboardInterrupt), signals_held():
        os.kill(os.getpid(), signal.SIGINT)
        done.append(True)

    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_hosts_still_to_come_hear_that_they_need_not():
    address = f"127.0.0.1:{free_port()}"
    there = begin(["sleep", "sleep"], address=address, count=3)
    time.sleep(3)
    there[1].send_signal(signal.SIGTERM)
    late = begin(["sleep"], address=address, count=3, ids=[2])

    results = finish_hosts([*there, *late], timeout_s=60)

    assert [(code, told(err)) for code, _, err in results] == [(0, [NOTHING])] * 3


def test_a_host_told_to_stop_before_it_joins_tells_the_others():
    results = finish_hosts(begin(["sleep", "told before"]), timeout_s=60)

    assert [(code, told(err)) for code, _, err in results] == [(0, [NOTHING])] * 2


def test_hosts_end_where_nobody_reads_what_they_print():
    """As when the program that started them has been killed."""
    processes = begin(["compile"] * 2)
    for process in processes:
        wait_for(process, "compiling")
        process.stdout.close()
        process.stderr.close()

    processes[1].send_signal(signal.SIGTERM)

    assert [process.wait(30) for process in processes] == [0, 0]


def test_training_goes_on_without_its_terminal(tmp_path, corpus_dir):
    workdir = tmp_path / "run"
    process = start(train_args(workdir, corpus_dir, "--config.train.steps=12"))
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()

    assert process.wait(120) == 0
    assert (workdir / "checkpoints" / "12").is_dir()


def test_a_reader_that_leaves_is_no_bug():
    process = start(["rehearse", "--list"])
    process.stdout.close()

    assert process.wait(60) == 141
    assert process.stderr.read() == ""


STARTER = """
import pathlib, sys, time
from mtp_jax.rehearsal.processes import HostGroup

group = HostGroup(sys.argv[2:], hosts=2, devices=1, logs=pathlib.Path(sys.argv[1]))
print(group.pid(0), group.pid(1), flush=True)
time.sleep(1000)
"""


def gone(pids, within_s):
    """True if all of these processes have ended by then."""
    end = time.monotonic() + within_s
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_running(pid):
    """True for a process that has not ended, though nobody may have waited for it."""
    try:
        return "\nState:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid):
    text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def wait_for_children(process, count):
    end = time.monotonic() + 60
    while len(found := children(process.pid)) < count:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return found


def kill(pids):
    for pid in pids:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("after_s", [0, 4])
def test_hosts_of_a_killed_rehearsal_end_with_it(after_s, tmp_path, corpus_dir):
    args = train_args(tmp_path / "run", corpus_dir, MANY)
    process = start([STARTER, tmp_path / "logs", *args], program=[sys.executable, "-c"])
    pids = [int(word) for word in process.stdout.readline().split()]
    time.sleep(after_s)
    if after_s:
        os.kill(pids[1], signal.SIGSTOP)  # as a fault of the rehearsal does

    process.kill()

    try:
        assert gone(pids, within_s=5)
    finally:
        kill(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_leaves_nothing_when_it_is_interrupted(number, tmp_path):
    program = (sys.executable, "-c", EXPORT, str(int(number)), "mtp-jax")
    options = [f"--workdir={RUN}", f"--output={tmp_path / 'out'}", "--format=gguf"]

    code, _, err = finish(start(["export", *options], program=program), timeout_s=120)

    assert (code, told(err)) == (128 + number, ["mtp-jax: interrupted"])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rehearsal_that_is_told_to_end_ends_its_hosts(number, tmp_path):
    process = start(
        [
            "rehearse",
            f"--config={ROOT / 'configs' / 'tiny.py'}",
            "--hosts=2",
            "--only=kill_one",
            f"--workdir={tmp_path / 'run'}",
        ]
    )
    pids = wait_for_children(process, 2)

    process.send_signal(number)
    code, _, err = finish(process, timeout_s=30)

    try:
        assert (code, told(err)) == (128 + number, ["mtp-jax: interrupted"])
        assert gone(pids, within_s=1) and "Traceback" not in err
    finally:
        kill(pids)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 0, marks=pytest.mark.slow),
    ],
)
def test_local_hosts_end_with_their_script(number, code, tmp_path, corpus_dir):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [
            ROOT / "launch" / "local.sh",
            "2",
            *train_args(tmp_path / "run", corpus_dir, MANY)[1:],
        ],
        env={k: v for k, v in environment.items() if not k.startswith("JAX_")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(process, tmp_path / "run", 1)
    pids = children(process.pid)

    process.send_signal(number)

    try:
        assert process.wait(60) == code
        assert gone(pids, within_s=30)
        assert (tmp_path / "run" / "checkpoints").is_dir()
    finally:
        kill(pids)
