"""The verb `grow`: more, fewer or other heads for a model that is there."""

from typing import get_args

from mtp_jax.cli.args import Parser, add_data, edited, positive_int
from mtp_jax.config import HeadStart, as_tree
from mtp_jax.config.regrow import config_of
from mtp_jax.distributed import cluster
from mtp_jax.errors import say


def main(argv: list[str]) -> int:
    """Writes the new workdir and prints where its heads begin.

    Raises:
      UserError: a flag, heads that cannot be, no text to fit to, or a folder that is
        not empty.
    """
    parser = Parser(
        "mtp-jax grow",
        "Give a model other heads; head 1 stays as it is, to the bit.",
        epilog="Any field of the config: --config.section.field=value; of the model, "
        "--config.heads alone.",
    )
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--output", required=True, metavar="B", help="the new workdir")
    parser.add_argument(
        "--heads", required=True, type=positive_int, metavar="N", help="of the model"
    )
    parser.add_argument(
        "--start",
        choices=get_args(HeadStart),
        default="ridge",
        help="where new heads begin (ridge)",
    )
    parser.add_argument(
        "--fit_tokens",
        type=positive_int,
        default=65_536,
        help="of training text, that a start is fitted to (65536)",
    )
    parser.add_argument(
        "--keep_optimizer",
        action="store_true",
        help="go on at the step, with the moments and at the place in the text of the "
        "run; else a new run",
    )
    parser.add_argument("--step", type=int, help="checkpoint; the latest if not given")
    add_data(parser)
    cluster.add_options(parser)
    args, overrides = parser.parse_known_args(argv)
    where = cluster.from_options(args)
    before = config_of(args.workdir)
    tree = as_tree(before)
    if args.heads > before.model.n_future_tokens == 1:
        tree["heads"]["norm"] = "own"
    sections = edited(tree, args.workdir, overrides)

    if where is None or where.process_id == 0:
        say(f"growing {args.workdir} to {args.heads} heads ...")
    # Not before the flags are known to be good: this imports JAX.
    import jax

    from mtp_jax.growth.grow import grow

    grown = grow(
        args.workdir,
        args.output,
        heads=args.heads,
        start=args.start,
        sections=sections,
        data=args.data,
        fit_tokens=args.fit_tokens,
        keep_optimizer=args.keep_optimizer,
        step=args.step,
        cluster=where,
    )
    if jax.process_index() != 0:
        return 0
    if grown.losses is None:
        print("no held-out text, so no start losses; --data=DIR names some")
    else:
        print("head  loss at the start (nats)")
        for i, loss in enumerate(grown.losses, 1):
            print(f"{i:>4}  {loss:>24.4f}")
    print(f"written to {args.output}, step {grown.step}")
    return 0
