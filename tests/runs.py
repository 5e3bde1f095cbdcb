"""Real runs in processes of their own, for tests."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from mtp_jax.distributed.lifetime import PARENT

ROOT = pathlib.Path(__file__).parent.parent
# Larger data than the tests' own, where it is there.
SHARED = pathlib.Path(
    os.environ.get("MTP_JAX_TEST_DATA", ROOT.parent / "shared" / "data")
)
CACHE = ROOT / ".pytest_cache" / "jax"
TIMINGS = ("tokens_per_s", "step_s", "data_wait_share", "goodput", "time")
SLOWEST = ("slowest_host", "slowest_host_s")
TINY_FILE = ROOT / "configs" / "tiny.py"
SMALL = ("--config.data.seq_len=32", "--config.optim.peak_lr=3e-3")

_started: list[subprocess.Popen] = []


def train_args(workdir, corpus, *overrides):
    """Arguments of a run of configs/tiny.py that logs every step and no more."""
    return [
        "train",
        f"--config={TINY_FILE}",
        f"--workdir={workdir}",
        f"--config.data.sources={corpus}",
        f"--config.train.compilation_cache={CACHE}",
        "--config.log.every=1",
        "--config.log.tensorboard=False",
        "--config.eval.every=0",
        *overrides,
    ]


def start(args, *, devices=1, program=(sys.executable, "-m", "mtp_jax")):
    """`python -m mtp_jax args` on so many CPU devices, begun; or another program."""
    args = [args] if isinstance(args, str) else args
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))},
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    if program[0] == sys.executable:  # then nothing is left, however the tests end
        environment[PARENT] = str(os.getpid())
    process = subprocess.Popen(
        [*program, *map(str, args)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _started.append(process)
    return process


def kill_what_is_left():
    """Kills what a test that failed may have left behind."""
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.communicate()
    _started.clear()


def finish(process, timeout_s=240):
    """Exit code, stdout and stderr of a process."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def complete(args, timeout_s=240, **options):
    """Stdout of a run that must end well."""
    code, out, err = finish(start(args, **options), timeout_s)
    assert code == 0, f"exit code {code}\n{out[-2000:]}\n{err[-4000:]}"
    return out


def records(workdir, name="metrics.jsonl"):
    path = pathlib.Path(workdir) / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def hashes(workdir):
    return [row["batch_hash"] for row in records(workdir)]


def losses(workdir, name="metrics.jsonl", key="loss"):
    return np.array([row[key] for row in records(workdir, name)])


def without_timings(rows):
    return [
        {k: v for k, v in row.items() if k not in TIMINGS + SLOWEST} for row in rows
    ]


def newest_step(workdir):
    """The last whole line's step, while a run may be writing; 0 if there is none."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(process, workdir, step, timeout_s=240):
    """Waits until a run has logged `step`."""
    end = time.monotonic() + timeout_s
    while newest_step(workdir) < step:
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < end, f"step {step} never came"
        time.sleep(0.01)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_hosts(args, count, *, devices=1, **options):
    """A run of so many processes on this machine, begun."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    return [
        start(
            [*args, address, f"--num_processes={count}", f"--process_id={i}"],
            devices=devices,
            **options,
        )
        for i in range(count)
    ]


def finish_hosts(processes, timeout_s=240):
    """(exit code, stdout, stderr) of each; none is left behind."""
    try:
        return [finish(process, timeout_s) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def complete_hosts(args, count, timeout_s=240, **options):
    """Stdout of process 0 of a run that must end well on all hosts."""
    results = finish_hosts(start_hosts(args, count, **options), timeout_s)
    for i, (code, out, err) in enumerate(results):
        assert code == 0, f"host {i}: code {code}\n{out[-2000:]}\n{err[-4000:]}"
    return results[0][1]


def told(err):
    """What the program itself said on stderr: not the lines of libraries."""
    return [line for line in err.splitlines() if line.startswith("mtp-jax:")]


def mesh_options(mesh):
    """Options of a mesh (replica, fsdp, tensor, sequence)."""
    names = ("replica", "fsdp", "tensor", "sequence")
    return [f"--config.mesh.{name}={n}" for name, n in zip(names, mesh, strict=True)]


def audited(workdir, *options):
    return json.loads(complete(["audit", f"--workdir={workdir}", "--json", *options]))
