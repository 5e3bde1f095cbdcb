"""The verb `train`: from a config and a workdir to a run, begun or continued."""

from mtp_jax.cli.args import Parser, config_from, config_of_run
from mtp_jax.distributed import cluster


def main(argv: list[str]) -> int:
    """Trains; 0 when the run is finished or was told to stop.

    Raises:
      UserError: a flag, or a config that does not fit the data, devices or workdir.
      RunFailed: the run cannot go on.
    """
    parser = Parser(
        "mtp-jax train",
        "Train a model, or go on where the workdir's newest checkpoint stands.",
        epilog="Any field of the config: --config.section.field=value.",
    )
    parser.add_argument(
        "--config",
        metavar="F",
        help="a Python file, FILE or FILE:ARGUMENT; default: what the run in the "
        "workdir had",
    )
    parser.add_argument(
        "--workdir", required=True, metavar="D", help="folder of the run"
    )
    cluster.add_options(parser)
    args, overrides = parser.parse_known_args(argv)
    if args.config is None:
        config = config_of_run(args.workdir, overrides)
    else:
        config = config_from(args.config, overrides)
    where = cluster.from_options(args)

    # Not before the flags are known to be good: this imports JAX.
    from mtp_jax.run.train import train

    train(config, args.workdir, cluster=where)
    return 0
