"""The verb `import`: a model of other people as a workdir."""

import dataclasses
import json
from typing import TYPE_CHECKING

from mtp_jax.cli.args import Parser, edited, positive_int
from mtp_jax.config import Config, TrainConfig, as_tree
from mtp_jax.distributed import cluster
from mtp_jax.errors import counted

if TYPE_CHECKING:
    from mtp_jax.run.import_model import ImportReport


def main(argv: list[str]) -> int:
    """Makes the workdir and prints what became of the tensors.

    Raises:
      UserError: a flag, or a model, file or folder that cannot be taken.
      RunFailed: the model that was made says something else than the file.
    """
    parser = Parser(
        "mtp-jax import",
        "Make a workdir of a model of other people: a folder of Hugging Face "
        "(safetensors), Meta (consolidated.pth) or Fast-LLM, a .gguf file, a .bin file "
        "of llama2.c. evaluate, generate, verify and train take it.",
        epilog="Any field of the run's config.train: --config.train.field=value.",
    )
    parser.add_argument(
        "--from", dest="source", required=True, metavar="PATH", help="folder or file"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="D",
        help="a new folder, here or in an object store",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="bytes, or a tokenizer's file, tok*.bin of llama2.c too; default: that "
        "beside the weights, or in their .gguf",
    )
    parser.add_argument(
        "--seq_len",
        type=positive_int,
        metavar="T",
        help="positions of the run's rows (the model's context, at most 1024)",
    )
    for name, what in (("param", "weights"), ("compute", "products")):
        parser.add_argument(
            f"--{name}_dtype",
            choices=("float32", "bfloat16"),
            default="float32",
            help=f"of {what} (float32)",
        )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    cluster.add_options(parser)
    args, overrides = parser.parse_known_args(argv)
    where = cluster.from_options(args)
    tree = {"train": as_tree(Config())["train"]}
    train = TrainConfig(**edited(tree, "import", overrides)["train"])

    # Not before the flags are known to be good: this imports JAX.
    import jax

    from mtp_jax.run.import_model import import_model

    report = import_model(
        args.source,
        args.workdir,
        tokenizer=args.tokenizer,
        seq_len=args.seq_len,
        param_dtype=args.param_dtype,
        compute_dtype=args.compute_dtype,
        train=train,
        cluster=where,
    )
    if jax.process_index() != 0:
        return 0
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(_told(report, args.workdir))
    return 0


def _told(report: "ImportReport", workdir: str) -> str:
    """The report for people."""
    lines = [
        f"{report.source}: {report.family} ({report.format}), "
        f"{report.parameters / 1e6:.2f} M parameters, "
        f"{'tied' if report.tied else 'untied'} tables, context {report.context}",
        f"used: {counted(len(report.used), 'tensor')} of "
        f"{counted(len(report.sha256), 'file')}",
        f"ignored: {counted(len(report.ignored), 'tensor')}",
    ]
    lines += [f"  {name}: {why}" for name, why in report.ignored.items()]
    lines += [
        f"made: {counted(len(report.made), 'parameter')}",
        f"logits differ from those of the file by {report.largest_difference:.1e} at "
        f"most, and their deviation is {report.logits_deviation:.2f}",
        f"written to {workdir}",
    ]
    return "\n".join(lines)
