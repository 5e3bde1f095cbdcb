"""The verb `evaluate`: figures of a trained model on held-out text."""

from typing import Any

from mtp_jax.cli.args import Parser, add_data, positive_int
from mtp_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Prints a table and writes eval.json into the workdir.

    Raises:
      UserError: a flag, the run, a corpus, or a file that cannot be written.
    """
    parser = Parser("mtp-jax evaluate", "Measure a trained model on held-out text.")
    parser.add_argument("--workdir", required=True, metavar="D", help="folder of a run")
    parser.add_argument(
        "--step", type=int, metavar="S", help="which checkpoint; default: the newest"
    )
    parser.add_argument(
        "--heads", type=int, metavar="K", help="keep only the first K heads"
    )
    add_data(parser)
    parser.add_argument(
        "--max_batches",
        type=positive_int,
        metavar="B",
        help="measure only so many batches, evenly spread; default: all",
    )
    args = parser.parse_args(argv)

    # Not before the flags are known to be good: these import JAX.
    from mtp_jax.checkpoint import restore
    from mtp_jax.eval.heldout import evaluate
    from mtp_jax.storage import run_at, write_json

    restored = restore.restore_model(args.workdir, step=args.step, heads=args.heads)
    result = evaluate(restored, data=args.data, max_batches=args.max_batches)
    path = run_at(args.workdir)[0] / "eval.json"
    print(_table(result))
    try:
        write_json(path, result)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    print(f"written to {path}")
    return 0


def _table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = ["head  loss (nats)  perplexity  accuracy  accepted"]
    accepted = [1.0, *result["accept"]["by_head"]]
    for head, share in zip(result["heads"], accepted, strict=True):
        lines.append(
            f"{head['offset']:>4}  {head['loss']:>11.4f}  {head['perplexity']:>10.3f}"
            f"  {head['accuracy']:>8.4f}  {share:>8.4f}"
        )
    lines.append(
        f"{result['bits_per_byte']:.4f} bits per byte; accepted length "
        f"{result['accept']['length']:.3f} (teacher-forced); {result['tokens']} tokens"
    )
    return "\n".join(lines)
