"""The verb `runs`: the runs under a folder, their steps, losses and differences."""

import dataclasses
import json
import shutil
import sys
import textwrap

from mtp_jax.cli.args import Parser
from mtp_jax.errors import on_terminal
from mtp_jax.run.workdirs import RunSummary, differences, list_runs, told_time


def main(argv: list[str]) -> int:
    """Prints a table, or JSON; 0 also where there are no runs.

    Raises:
      UserError: a flag, or no such folder.
    """
    parser = Parser(
        "mtp-jax runs",
        "List the runs under a folder.",
        epilog="Columns: step of the last record, of all steps; loss: of head 1, at "
        "that step; bits/byte: held out, of the last evaluation; updated: when the log "
        "last grew; config: the fields that are not as in most of these runs.",
    )
    parser.add_argument(
        "folder", nargs="?", default="runs", metavar="DIR", help="default: runs"
    )
    parser.add_argument("--json", action="store_true", help="print an array of objects")
    args = parser.parse_args(argv)
    runs = list_runs(args.folder)
    apart = differences(runs)
    if args.json:
        print(json.dumps([_object(*pair) for pair in zip(runs, apart, strict=True)]))
    elif not runs:
        print(f"no runs in {args.folder}: a run's folder has a file run.json")
    else:
        columns = shutil.get_terminal_size().columns
        print(_table(runs, apart, columns if on_terminal(sys.stdout) else None))
    return 0


def _object(run: RunSummary, apart: dict[str, object]) -> dict[str, object]:
    fields = dataclasses.asdict(run)
    del fields["config"]
    return {**fields, "differs": apart}


def _table(
    runs: list[RunSummary], apart: list[dict[str, object]], width: int | None
) -> str:
    """A line a run; on a terminal narrower than that, fields have their own lines."""
    rows = [("workdir", "step", "loss", "bits/byte", "updated", "config")]
    for run, fields in zip(runs, apart, strict=True):
        rows.append(
            (
                run.workdir,
                f"{run.step}/{run.steps or '?'}" + (" done" if run.finished else ""),
                "" if run.loss is None else f"{run.loss:.3f}",
                "" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}",
                told_time(run.updated),
                run.wrong or " ".join(f"{k}={v}" for k, v in fields.items()),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        [cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows
    ]
    lines = ["  ".join(row).rstrip() for row in table]
    if width is None or max(map(len, lines)) < width:
        return "\n".join(lines)
    (*names, _), *table = table
    lines = ["  ".join(names).rstrip()]
    for *cells, told in table:
        lines.append("  ".join(cells).rstrip())
        lines += textwrap.wrap(
            told, max(width - 1, 20), initial_indent="    ", subsequent_indent="    ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)
