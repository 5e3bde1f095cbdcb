"""The verb `export`: a model in a format of other programs."""

from mtp_jax.cli.args import Parser, positive_int

_FORMATS = ("hf", "gguf", "meta", "fastllm", "eagle3")


def main(argv: list[str]) -> int:
    """Writes the folder, and prints what the format does not hold.

    Raises:
      UserError: a flag, a folder that is not empty, or a model that the format cannot
        hold.
      RunFailed: what was read again is not the model.
    """
    parser = Parser(
        "mtp-jax export",
        "Write a model in a format of other programs, read it again, compare it.",
        epilog="docs/export.md tells what each format holds, and who reads it.",
    )
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--output", required=True, metavar="E", help="the new folder")
    parser.add_argument("--format", choices=_FORMATS, default="hf", help="(hf)")
    parser.add_argument("--step", type=int, help="checkpoint; the latest if not given")
    parser.add_argument(
        "--heads", type=positive_int, help="how many to keep, from head 1"
    )
    parser.add_argument(
        "--positions",
        type=positive_int,
        help="the longest text that readers are told of; that of training if not given",
    )
    parser.add_argument(
        "--shard_bytes",
        type=positive_int,
        default=5_000_000_000,
        help="the most in one file of tensors, of hf (5e9)",
    )
    args = parser.parse_args(argv)

    # Not before the flags are known to be good: these import JAX.
    from mtp_jax.checkpoint.restore import restore_model
    from mtp_jax.exporting.export import export

    model = restore_model(args.workdir, step=args.step, heads=args.heads)
    lost = export(
        model,
        args.output,
        format=args.format,
        positions=args.positions,
        shard_bytes=args.shard_bytes,
    )
    for line in lost:
        print(f"not in this format: {line}")
    print(f"written to {args.output}, read again and compared with step {model.step}")
    return 0
