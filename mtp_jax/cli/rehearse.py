"""The verb `rehearse`: faults of a pod, injected into a small run on this machine."""

import argparse
import functools
from collections.abc import Sequence

from mtp_jax.cli.args import Parser, config_from, positive_int
from mtp_jax.errors import UserError, counted
from mtp_jax.rehearsal.faults import FAULTS
from mtp_jax.rehearsal.rehearsal import FaultResult, Rehearsal, rehearse


def main(argv: list[str]) -> int:
    """Runs the verb. The exit code is 1 if anything did not hold.

    Raises:
      UserError: a flag, a config, or a folder that is in use.
    """
    args, overrides = _parser().parse_known_args(argv)
    if args.list:
        for fault in FAULTS:
            print(f"{fault.name:18} {fault.does}: {fault.follows}")
        return 0
    if args.config is None:
        raise UserError("--config=F is missing; configs/tiny.py is one.")
    result = rehearse(
        config_from(args.config, overrides),
        hosts=args.hosts,
        devices_per_host=args.devices_per_host,
        faults=args.faults,
        only=args.only or (),
        seed=args.seed,
        workdir=args.workdir,
        report=functools.partial(print, flush=True),
    )
    if result.broken:
        logs = result.folder / "logs"
        print(f"mtp-jax rehearse: {result.broken}; the logs are in {logs}")
    else:
        _print_table(result)
    return 0 if result.held else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "mtp-jax rehearse",
        "Train a config, scaled down, on hosts of this machine, and break it.",
        epilog="Any field of the config: --config.section.field=value.",
    )
    parser.add_argument("--config", metavar="F", help="a Python file of a run")
    parser.add_argument("--hosts", type=positive_int, default=4, help="processes (4)")
    parser.add_argument(
        "--devices-per-host", type=positive_int, default=2, help="CPU devices (2)"
    )
    parser.add_argument("--faults", type=positive_int, help="how many; default: each")
    parser.add_argument("--seed", type=int, default=0, help="of the script of faults")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this fault; may be repeated"
    )
    parser.add_argument(
        "--workdir",
        metavar="D",
        help="for the run and its logs; default: a temporary one, kept if not all held",
    )
    parser.add_argument("--list", action="store_true", help="the faults, and no more")
    return parser


def _print_table(result: Rehearsal) -> None:
    """Prints a row for each fault, what went wrong, and the sum."""
    head = ["fault", "what the hosts said", "seconds", "recovered", "hashes"]
    table = [head, *(_cells(row, result.reference) for row in result.rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
    print()
    for cells in table:
        line = "  ".join(f"{x:{w}}" for x, w in zip(cells, widths, strict=True))
        print(line.rstrip())
    for row in result.rows:
        if row.outcome.wrong:
            print(f"{row.fault}: {row.outcome.wrong}")
    held = sum(row.held(result.reference) for row in result.rows)
    print(
        f"{held} of {len(result.rows)} held; "
        f"{counted(len(result.rows[-1].hashes), 'step')}, the "
        f"hashes of {len(result.reference)} compared; {result.seconds:.0f} s; "
        f"{result.folder}"
    )


def _cells(row: FaultResult, reference: Sequence[str]) -> list[str]:
    """Cells of a row: fault, said, seconds, recovered, hashes."""
    return [
        row.fault,
        row.outcome.said[:100],
        f"{row.outcome.seconds:.1f}",
        "yes" if not row.not_recovered else f"NO: {row.not_recovered}",
        counted(len(row.hashes), "step") if row.same_batches(reference) else "NO",
    ]
