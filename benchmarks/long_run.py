"""Memory, files and records of ten thousand tiny steps with saves and restarts.

The run is stopped three times, by SIGTERM and by SIGKILL in turn, and started again by
the same command. The memory of its process is read from outside all the while; what is
compared is the median after a warm-up of each start with that of its end.

python -m benchmarks.long_run
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.timing import options, print_environment, print_table, script
from mtp_jax.data.prepare import prepare
from mtp_jax.distributed.lifetime import PARENT

ROOT = pathlib.Path(__file__).parent.parent
_EVERY_S = 0.25  # between two looks at the process


@dataclasses.dataclass(frozen=True)
class Look:
    """A process as it was seen once; memory is in MB."""

    step: int
    resident: float
    anonymous: float  # without the pages of files, which the kernel takes back
    open_files: int
    threads: int


@dataclasses.dataclass(frozen=True)
class Started:
    """A start of the run: how it ended, and what was seen of it."""

    ended_by: str
    looks: list[Look]
    seconds: float


@script
def main(argv: list[str]) -> int:
    """Prints a row for each start, and files; 1 if records are lost."""
    args = options(
        argv,
        "Memory, files and records of a long run that is stopped and started again.",
        steps=10_000,
        every=500,  # steps between two saves, and two evaluations
        warm=1000,  # steps of each start before its memory is compared
        input=str(ROOT / "mtp_jax"),
        workdir="",  # to keep the run; empty: a folder that is removed
    )
    print_environment(1)
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(args.workdir or f"{folder}/run")
        prepare(args.input, f"{folder}/corpus", heldout=0.1, workers=1)
        starts, files = _run(args, workdir, f"{folder}/corpus")
        print_table(
            ("start", "steps", "ended by", "s", "MB, warm", "MB, end", "growth",
             "of it anonymous", "open files", "threads"),
            *(_row(i, start, args.warm) for i, start in enumerate(starts, 1)),
        )  # fmt: skip
        lost = _lost(workdir, args.steps, args.every)
        print(f"files in the workdir when a start ended: {', '.join(map(str, files))}")
        print(f"records lost or doubled: {lost}")
    return 1 if lost else 0


def _run(
    args: argparse.Namespace, workdir: pathlib.Path, corpus: str
) -> tuple[list[Started], list[int]]:
    """Trains with three stops; returns the starts, and files of the workdir after each.

    The first three starts have a tenth of the steps each, so that the last is long.
    """
    stops: list[tuple[int, signal.Signals | None]] = [
        (args.steps * tenth // 10 + args.every // 3, number)
        for tenth, number in (
            (1, signal.SIGTERM),
            (2, signal.SIGKILL),
            (3, signal.SIGTERM),
        )
    ]
    starts, files = [], []
    for stop, number in [*stops, (args.steps, None)]:
        starts.append(_watched(_command(args, workdir, corpus), workdir, stop, number))
        files.append(sum(path.is_file() for path in workdir.rglob("*")))
    return starts, files


def _command(args: argparse.Namespace, workdir: pathlib.Path, corpus: str) -> list[str]:
    return [
        *(sys.executable, "-m", "mtp_jax", "train"),
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--workdir={workdir}",
        f"--config.data.sources={corpus}",
        f"--config.train.steps={args.steps}",
        f"--config.checkpoint.every={args.every}",
        f"--config.eval.every={args.every}",
        "--config.log.every=1",
    ]


def _watched(
    command: list[str], workdir: pathlib.Path, stop: int, number: signal.Signals | None
) -> Started:
    """Runs a command until the run is at a step, or to its end, and looks at it.

    Raises:
      RuntimeError: it failed.
    """
    began = time.monotonic()
    environment = {**os.environ, PARENT: str(os.getpid()), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            command, env=environment, stdout=told, stderr=subprocess.STDOUT
        )
        looks: list[Look] = []
        first = _newest_step(workdir)
        while process.poll() is None:
            step = _newest_step(workdir)
            if step != first and (look := _look(process.pid, step)):
                looks.append(look)
            if number is not None and step >= stop:
                process.send_signal(number)
                process.wait()
            time.sleep(_EVERY_S)
        code = process.returncode
        if code not in (0, -signal.SIGKILL):
            told.seek(0)
            raise RuntimeError(f"the run failed, code {code}: {told.read()[-2000:]}")
    ended_by = "its last step" if number is None else number.name
    return Started(ended_by, looks, time.monotonic() - began)


def _look(pid: int, step: int) -> Look | None:
    """The process now; None if it has just ended."""
    try:
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
        open_files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in text.splitlines())
    if "VmRSS" not in found:
        return None
    resident, anonymous = (
        int(found[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon")
    )
    return Look(step, resident, anonymous, open_files, int(found["Threads"]))


def _newest_step(workdir: pathlib.Path) -> int:
    """The step of the last whole line of the metrics; 0 if there is none."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:  # the file is being put in place
        return 0


def _row(number: int, start: Started, warm: int) -> tuple[object, ...]:
    """A row of the table: medians of the first and the last fifth after the warm-up."""
    first, last = start.looks[0].step, start.looks[-1].step
    # At its last step a process is taking itself apart.
    looks = [look for look in start.looks if look.step < last] or start.looks
    after = [look for look in looks if look.step >= first + warm] or looks[-2:]
    fifth = max(1, len(after) // 5)
    begin, end = after[:fifth], after[-fifth:]

    def growth(name: str) -> str:
        a, b = (statistics.median(getattr(x, name) for x in y) for y in (begin, end))
        return f"{100 * (b / a - 1):+.1f} %"

    return (
        *(number, f"{first}..{last}", start.ended_by, f"{start.seconds:.0f}"),
        f"{statistics.median(look.resident for look in begin):.0f}",
        f"{statistics.median(look.resident for look in end):.0f}",
        *(growth("resident"), growth("anonymous")),
        f"{begin[0].open_files}..{end[-1].open_files}",
        f"{begin[0].threads}..{end[-1].threads}",
    )


def _lost(workdir: pathlib.Path, steps: int, every: int) -> int:
    """Steps and evaluations that are not there exactly once, in order."""
    lost = 0
    for name, wanted in (
        ("metrics.jsonl", range(1, steps + 1)),
        ("heldout.jsonl", range(every, steps + 1, every)),
    ):
        lines = (workdir / name).read_text().splitlines()
        found = [json.loads(line)["step"] for line in lines]
        lost += len(set(wanted) ^ set(found)) + len(found) - len(set(found))
        lost += found != sorted(found)
    return lost


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
