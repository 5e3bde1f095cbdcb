"""The verb `train`: from a config and a workdir to a run, begun or continued."""

from mtp_jax.cli.args import Parser, config_from, config_of_run
from mtp_jax.config import config_to_python
from mtp_jax.distributed import cluster
from mtp_jax.errors import say


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
    parser.add_argument("--workdir", metavar="D", help="folder of the run")
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="print every field, with its comment, as a config file; train nothing",
    )
    cluster.add_options(parser)
    args, overrides = parser.parse_known_args(argv)
    if args.workdir is None and (args.config is None or not args.print_config):
        parser.error("the following arguments are required: --workdir")
    if args.config is None:
        config = config_of_run(args.workdir, overrides)
    else:
        config = config_from(args.config, overrides)
    where = cluster.from_options(args)
    if args.print_config:
        print(config_to_python(config))
        return 0
    if where is None or where.process_id == 0:
        say(f"starting {args.workdir}: reads the corpora, compiles ...")
    # Not before the flags are known to be good: this imports JAX.
    from mtp_jax.run.train import train

    train(config, args.workdir, cluster=where)
    return 0
