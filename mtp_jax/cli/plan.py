"""The verb `plan`: what a training step costs on a TPU, without one."""

import argparse
import functools
import json
import math
import sys

from mtp_jax.cli.args import Parser, config_from, positive_int
from mtp_jax.cli.plan_table import table
from mtp_jax.planning.plan import plan


def main(argv: list[str]) -> int:
    """Runs the verb; prints a table, or JSON, and its progress on stderr.

    Raises:
      UserError: a flag, a topology, or a config that does not suit it.
    """
    parser = Parser(
        "mtp-jax plan",
        "Compile the training step for TPUs that are not there, and tell its cost.",
        epilog="Any field of the config: --config.section.field=value. The batch is "
        "the config's; compiling a large model takes minutes, for every topology and "
        "number of heads; what does not fit is compiled again with one change after "
        "another, until it does. Columns: state: parameters and moments, 12 bytes a "
        "parameter whatever their dtype, and batch; "
        "temp: what else is alive at the peak; of: what a device has; step s: the "
        "least time of a step, which arithmetic (compute), memory traffic (hbm) or "
        "the interconnect (links) bounds; tokens/s: of a chip at that time; vs n=1: "
        "time to that of one head on as many layers; even: accepted tokens a pass "
        "from which blockwise decoding is faster than plain; chip-hours, days, "
        "dollars: what the tokens take at the least time of a step, without pauses. "
        "Collectives: 3 of 4 means that the device computes during three of four; "
        "exposed: GB that it sends in those during which it does not.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="F",
        help="a Python file, FILE or FILE:ARGUMENT",
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="T",
        type=lambda text: text.split(","),
        help="such as v5p:4x4x4 or v5p-128, 2xv5p:4x4x4 for two slices; several with "
        "commas",
    )
    parser.add_argument(
        "--heads",
        metavar="N",
        type=lambda text: sorted({positive_int(n) for n in text.split(",")}),
        help="numbers of heads, with commas; default: the config's. n = 1 is always "
        "there, to compare with",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=_count,
        help="such as 2e12 or 500B: how many are to be trained; default: the config's "
        "steps",
    )
    parser.add_argument(
        "--price", metavar="D", type=_price, help="dollars that a chip costs an hour"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    args, overrides = parser.parse_known_args(argv)
    cfg = config_from(args.config, overrides)
    heads = args.heads or [cfg.model.n_future_tokens]
    report = functools.partial(print, file=sys.stderr, flush=True)
    rows = plan(
        cfg,
        args.topology,
        heads=heads,
        tokens=args.tokens,
        chip_hour_dollars=args.price,
        progress=report,
    )
    print(json.dumps(rows, indent=2) if args.json else table(rows, heads))
    return 0


def _count(text: str) -> float:
    """An argparse type: a number of tokens, as 1000000, 1e6, 500B or 2T."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
    return scale * _price(text[:-1] if scale > 1 else text)


def _price(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
