"""The verb `evaluate`: figures of a trained model on held-out text."""

import argparse
import hashlib
import pathlib
from typing import Any

from mtp_jax.cli.args import Parser, add_data, positive_int
from mtp_jax.cli.task_options import TASK_OPTIONS, add_task_options
from mtp_jax.errors import UserError, counted


def main(argv: list[str]) -> int:
    """Prints a table and writes it into the workdir, a file a setting.

    With --tasks it measures benchmarks, and with --compare it sets runs side by side.

    Raises:
      UserError: a flag, the run, a corpus, or a file that cannot be written.
    """
    args = _parse(argv)
    if args.compare:
        from mtp_jax.cli.evaluate_tasks import compare

        return compare(args.compare)
    if args.tasks:
        from mtp_jax.cli.evaluate_tasks import check_references, measure

        return check_references(args) if args.reference else measure(args)

    # Not before the flags are known to be good: these import JAX.
    from mtp_jax.checkpoint import restore
    from mtp_jax.eval.heldout import evaluate
    from mtp_jax.storage import run_at, write_json

    restored = restore.restore_model(args.workdir, step=args.step, heads=args.heads)
    result = evaluate(restored, data=args.data, max_batches=args.max_batches)
    path = run_at(args.workdir)[0] / _file_name(args)
    print(_table(result))
    try:
        write_json(path, result)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    print(f"written to {path}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mtp-jax evaluate",
        "Measure a trained model on held-out text, or on benchmarks (--tasks).",
        epilog="Written to eval.json in the workdir, of tasks to eval/TASK.json; with "
        "options, to a file that they name, such as eval-step20-heads1.json.",
    )
    parser.usage = (
        "mtp-jax evaluate --workdir=D [options]\n"
        "       mtp-jax evaluate --workdir=D --tasks=A,B --data=FILE_OR_FOLDER "
        "[options]\n"
        "       mtp-jax evaluate --compare RUN RUN ..."
    )
    add = parser.add_argument
    add("--workdir", metavar="D", help="folder of a run")
    add("--step", type=int, metavar="S",
        help="which checkpoint; default: the newest")  # fmt: skip
    add("--heads", type=int, metavar="K", help="keep only the first K heads")
    add_data(parser)
    add("--max_batches", type=positive_int, metavar="B",
        help="measure only so many batches, evenly spread; default: all")  # fmt: skip
    add("--compare", nargs="+", metavar="RUN",
        help="set the results of tasks of several runs side by side")  # fmt: skip
    tasks = parser.add_argument_group("tasks")
    add_task_options(tasks)
    args = parser.parse_args(argv)
    _check_together(args)
    return args


def _check_together(args: argparse.Namespace) -> None:
    """Raises UserError if options do not go together."""
    if args.compare:
        if args.workdir or args.tasks:
            raise UserError("--compare takes the workdirs; give no --workdir, --tasks.")
        return
    if args.tasks is None:
        given = [name for name in TASK_OPTIONS if getattr(args, name)]
        if given:
            raise UserError(f"--{given[0]} is for benchmarks; give --tasks=NAME, too.")
    elif args.max_batches is not None:
        raise UserError("--max_batches is for held-out text; --limit=L for tasks.")
    elif len(args.data or ()) != 1:
        raise UserError("--tasks needs --data=FILE_OR_FOLDER, once.")
    if args.workdir is None and not args.reference:
        raise UserError("mtp-jax evaluate needs --workdir=D; see --help.")


def _file_name(args: argparse.Namespace) -> str:
    """The file for these options: figures of others are not written over."""
    parts = ["eval"]
    for name, value in (
        ("step", args.step),
        ("heads", args.heads),
        ("batches", args.max_batches),
    ):
        if value is not None:
            parts.append(f"{name}{value}")
    if args.data:
        folders = [str(pathlib.Path(name).resolve()) for name in args.data]
        digest = hashlib.sha256("\n".join(folders).encode()).hexdigest()[:6]
        parts.append(f"{pathlib.Path(folders[0]).name}_{digest}")
    return "-".join(parts) + ".json"


def _table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = ["head  loss (nats)  perplexity  accuracy  agrees"]
    accepted = [1.0, *result["accept"]["by_head"]]
    for head, share in zip(result["heads"], accepted, strict=True):
        lines.append(
            f"{head['offset']:>4}  {head['loss']:>11.4f}  {head['perplexity']:>10.3f}"
            f"  {head['accuracy']:>8.4f}  {share:>6.4f}"
        )
    lines.append(
        f"{result['bits_per_byte']:.4f} bits per byte of "
        f"{counted(result['batches'], 'batch')} ({counted(result['tokens'], 'token')})"
    )
    if len(result["heads"]) > 1:
        lines.append(
            f"heads agree for {result['accept']['length']:.3f} of "
            f"{len(result['heads'])} tokens on average: what a forward pass would "
            "accept, on true text, right or wrong"
        )
    return "\n".join(lines)
