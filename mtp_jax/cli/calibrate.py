"""The verb `calibrate`: which tree of drafts a model does best with."""

from typing import TYPE_CHECKING

from mtp_jax.cli.args import (
    Parser,
    add_data,
    add_draft_cache,
    output_file,
    positive_int,
)
from mtp_jax.errors import UserError, counted

if TYPE_CHECKING:
    from mtp_jax.decode.calibrate import Calibration
    from mtp_jax.planning.drafting import Drafting


def main(argv: list[str]) -> int:
    """Prints a table and writes the tree's file.

    Raises:
      UserError: a flag, a model of one head, no held-out text, or a file that cannot
        be written.
    """
    parser = Parser(
        "mtp-jax calibrate", "Measure the heads and choose a tree of drafts."
    )
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--output", required=True, metavar="FILE", help="the tree")
    parser.add_argument(
        "--nodes", type=positive_int, default=24, help="drafts in the tree (24)"
    )
    parser.add_argument(
        "--passages",
        type=positive_int,
        default=128,
        help="held-out passages of up to 256 tokens to measure (128)",
    )
    parser.add_argument("--step", type=int, help="checkpoint; the latest if not given")
    parser.add_argument(
        "--chip",
        metavar="KIND",
        help="also tell how many heads pay on it, by its roofline: v5e, v5p, h100 ...",
    )
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        default=1,
        help="texts decoded there at once (1)",
    )
    add_data(parser)
    add_draft_cache(parser)
    args = parser.parse_args(argv)
    output = output_file("output", args.output)

    # Not before the flags are known to be good: these import JAX.
    from mtp_jax.checkpoint import restore
    from mtp_jax.decode.calibrate import calibrate
    from mtp_jax.parallel.chips import chip_named
    from mtp_jax.planning.drafting import by_heads
    from mtp_jax.storage import write_json

    chip = chip_named(args.chip) if args.chip else None
    restored = restore.restore_model(args.workdir, step=args.step)
    restored = restored.with_data(args.data).with_draft_cache(args.draft_cache)
    result = calibrate(restored, passages=args.passages, nodes=args.nodes)
    print(_table(result))
    if chip is not None:
        found = by_heads(restored.config.model, result.accepted, chip, args.batch_size)
        print(_what_pays(found, args.chip, args.batch_size))
    try:
        write_json(output, result.content())
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error
    print(f"written to {output}")
    return 0


def _what_pays(found: "list[Drafting]", chip: str, batch_size: int) -> str:
    """Decoding with each number of heads on a chip, as a table for people."""
    from mtp_jax.planning.drafting import pays_most

    best = pays_most(found)
    at = f"{counted(batch_size, 'text')} at once on {chip}"
    lines = [
        f"blockwise decoding of {at}, weights and arithmetic alone:",
        "heads  tokens/pass  least ms a pass  times plain's speed",
    ]
    lines += [
        f"{x.n:>5}{x.tokens:>13.3f}{1e3 * x.pass_s:>17.4f}{x.speed_up:>21.2f}"
        for x in found
    ]
    return "\n".join([*lines, f"most pays: {counted(best.n, 'head')}"])


def _table(result: "Calibration") -> str:
    """The figures for people."""
    shown = (1, 2, 3, 5, 10)
    lines = [
        "share of positions where one of a head's best k drafts is right, of those "
        "where the drafts before it are:",
        "head" + "".join(f"{f'top {k}':>8}" for k in shown),
    ]
    for i, shares in enumerate(result.top_k, 2):
        lines.append(f"{i:>4}" + "".join(f"{shares[k - 1]:>8.4f}" for k in shown))
    depth = max(len(path) for path, _ in result.nodes)
    lines.append(
        f"{len(result.nodes)} drafts, {depth} deep: {result.tokens_per_forward:.3f} "
        f"tokens a forward pass (first candidates alone: {result.chain:.3f}); "
        f"{result.positions} positions, teacher-forced"
    )
    return "\n".join(lines)
