"""The verb `evaluate` with --tasks, --reference or --compare."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.progress

from mtp_jax.errors import RunFailed, UserError


def measure(args: argparse.Namespace) -> int:
    """Measures a model on tasks, prints figures, writes eval/TASK.json."""
    from mtp_jax.checkpoint import restore
    from mtp_jax.cli.decoder_args import decoder_of
    from mtp_jax.cli.task_options import file_stem
    from mtp_jax.eval.task_data import settings_of_use
    from mtp_jax.eval.task_run import measure_task
    from mtp_jax.reports.task_table import task_lines
    from mtp_jax.storage import run_at

    loaded = _load(args)
    sandbox = _sandbox(args, loaded)
    decoder = None if args.decoder is None else decoder_of(args.decoder)
    model = restore.restore_model(args.workdir, step=args.step, heads=args.heads)
    folder = run_at(args.workdir)[0] / "eval"
    for data in loaded:
        path = (
            folder
            / f"{file_stem(data.task.name, args, settings_of_use(data.task))}.json"
        )
        with _Bar(data.task.name) as bar:
            result = measure_task(
                model, data, path, decoder=decoder, sandbox=sandbox,
                report=bar.say, progress=bar.show,
            )  # fmt: skip
        print("\n".join(task_lines(result)))
        print(f"written to {path}", flush=True)
    return 0


def check_references(args: argparse.Namespace) -> int:
    """Judges the data's own solutions: shows that data and sandbox are in order.

    Raises:
      RunFailed: a solution does not pass.
    """
    loaded = _load(args)
    sandbox = _sandbox(args, loaded)
    failed = 0
    for data in loaded:
        name = data.task.name
        solved = [(i, x) for i, x in zip(data.numbers, data.examples, strict=True)
                  if getattr(x, "reference", None) is not None]  # fmt: skip
        if sandbox is None or not solved:
            raise UserError(f"--reference: {data.path} has no solutions of {name}.")
        verdicts = sandbox.run_all([x.program(x.reference) for _, x in solved])
        for (number, _), verdict in zip(solved, verdicts, strict=True):
            if not verdict.passed:
                print(f"{name} {number}: {verdict.why}")
        passed = sum(v.passed for v in verdicts)
        failed += len(verdicts) - passed
        print(f"{name}: {passed} of {len(verdicts)} solutions pass")
    if failed:
        raise RunFailed(f"{failed} solutions of the data do not pass")
    return 0


def compare(workdirs: Sequence[str]) -> int:
    """Prints tasks by runs, with intervals of the differences."""
    from mtp_jax.eval.comparison import compare_runs
    from mtp_jax.reports.task_table import comparison_lines

    names = [workdir.rstrip("/") for workdir in workdirs]
    print("\n".join(comparison_lines(compare_runs(workdirs), names)))
    return 0


def _load(args: argparse.Namespace) -> list[Any]:
    """The tasks with their data."""
    from mtp_jax.eval.task_data import TaskSettings, check_of_use, load_task
    from mtp_jax.eval.tasks.rows import task_named

    given = {
        "limit": args.limit,
        "samples": args.samples,
        "k": args.k,
        "temperatures": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "shots": args.shots,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    tasks = [task_named(name) for name in args.tasks]
    of_decoder = [] if args.decoder is None else ["decoder"]
    check_of_use(tasks, [*given, *of_decoder])
    settings = TaskSettings(**given)
    return [load_task(task, args.data[0], settings) for task in tasks]


def _sandbox(args: argparse.Namespace, loaded: Sequence[Any]) -> Any:
    """The sandbox if a task needs one."""
    from mtp_jax.eval.tasks.kinds import CodeTask
    from mtp_jax.sandbox.sandbox import Sandbox

    if not any(isinstance(data.task, CodeTask) for data in loaded):
        if args.allow_unsafe_execution:
            raise UserError(
                "--allow_unsafe_execution: no program is run in these tasks."
            )
        return None
    return Sandbox(unsafe=args.allow_unsafe_execution)


class _Bar:
    """A progress bar on stderr where that is a terminal, and lines."""

    def __init__(self, name: str):
        self._name = name
        self._bar = rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(),
            rich.progress.MofNCompleteColumn(),
            console=rich.console.Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._row: rich.progress.TaskID | None = None

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line."""
        print(line, flush=True)

    def show(self, name: str, done: int, total: int) -> None:
        """Shows how far a task is."""
        if self._row is None:
            self._row = self._bar.add_task(name, total=total)
        self._bar.update(self._row, completed=done, total=total)
