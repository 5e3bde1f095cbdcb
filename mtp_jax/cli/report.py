"""The verb `report`: a page about runs, or pictures of their figures."""

import argparse
import pathlib
from typing import Any

from mtp_jax.cli.args import Parser, add_data, output_file, positive_int
from mtp_jax.errors import UserError, say


def main(argv: list[str]) -> int:
    """Writes the report, and says what was left out.

    Raises:
      UserError: a flag, a run, or a file that cannot be written.
    """
    args = _parser().parse_args(argv)
    path = output_file("output", args.output)
    form = args.format or _form_of(path)
    figures = None
    if args.figures is not None:
        if form == "html":
            raise UserError("--figures is for pictures; give --format=png, too.")
        figures = args.figures.split(",")

    # Not before the flags are known to be good: these import JAX and matplotlib.
    from mtp_jax.reports.printable import printable
    from mtp_jax.reports.report import report

    left_out = report(
        args.workdir,
        path,
        form=form,
        figures=figures,
        data=args.data,
        texts=args.texts,
        files_only=args.files_only,
    )
    for line in left_out:
        say(printable(f"left out: {line}"))
    say(printable(f"written to {path}"))
    return 0


def _form_of(path: pathlib.Path) -> Any:
    """The format that the name of a file asks for; html by itself."""
    ending = path.suffix.removeprefix(".").lower()
    return ending if ending in ("png", "pdf", "svg") else "html"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "mtp-jax report",
        "Write a page about one run or several, or pictures of their figures.",
        epilog="A page needs nothing but a browser. Held-out text is read where the "
        "run's corpora are; give --data=DIR where they were moved. Figures: loss, "
        "accuracy, tokens, drafts, bits, throughput, goodput, time, rate, gradient, "
        "cosine, norm_ratio, positions, distance.",
    )
    add = parser.add_argument
    add("--workdir", required=True, action="append", metavar="D",
        help="folder of a run; may be repeated")  # fmt: skip
    add("--output", required=True, metavar="F", help="the file, such as report.html")
    add("--format", choices=("html", "png", "pdf", "svg"),
        help="by default, what the ending of the file says, or html")  # fmt: skip
    add("--figures", metavar="A,B", help="only these, in a picture")
    add("--texts", type=positive_int, default=3, metavar="K",
        help="held-out prompts to continue (3)")  # fmt: skip
    add("--files_only", action="store_true",
        help="load no model: nothing is computed on held-out text")  # fmt: skip
    add_data(parser)
    return parser
