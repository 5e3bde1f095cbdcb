"""The verb `study`: a claim about multi-token prediction, run and judged."""

import argparse
from typing import TYPE_CHECKING

from mtp_jax.cli.args import Parser, positive_int
from mtp_jax.errors import say
from mtp_jax.studies import STUDIES

if TYPE_CHECKING:
    from mtp_jax.studies.study import Size


def main(argv: list[str]) -> int:
    """Runs what a study lacks, and prints its page.

    Raises:
      UserError: a flag, no such study or arm, or a workdir of something else.
      RunFailed: a trial was told to stop; the same command goes on.
    """
    args = _parser().parse_args(argv)
    size: Size = "full" if args.full else "tiny" if args.tiny else "quick"
    workdir = args.workdir or f"runs/{args.name}-{size}"

    # Not before the flags are known to be good: this imports JAX.
    from mtp_jax.studies.runner import study

    result = study(
        args.name,
        workdir,
        size=size,
        seeds=args.seeds,
        steps=args.steps,
        arms=args.arm or (),
        data=args.data or (),
        report=say,
    )
    print(result.page)
    print(f"written to {workdir}/{args.name}.jsonl and .md")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "mtp-jax study",
        "Run a study: arms, seeds, and verdicts by rules that were written before.",
        epilog="\n".join(f"  {name:<16} {about}" for name, about in STUDIES.items()),
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", metavar="NAME", help="of the study, one of those below")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="minutes (the default)")
    size.add_argument("--full", action="store_true", help="what verdicts are for")
    size.add_argument("--tiny", action="store_true", help="to see that all runs")
    parser.add_argument("--seeds", type=positive_int, help="how many, from 0 on")
    parser.add_argument("--steps", type=positive_int, help="of training a trial")
    parser.add_argument("--arm", action="append", help="only this; may be repeated")
    parser.add_argument(
        "--data", action="append", metavar="DIR", help="a prepared corpus of your own"
    )
    parser.add_argument(
        "--workdir", help="of the results, which go on there (runs/NAME-SIZE)"
    )
    return parser
