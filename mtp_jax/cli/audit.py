"""The verb `audit`: proves from a run's files which data its logged steps have seen."""

import dataclasses
import json
from typing import Any

from mtp_jax.cli.args import Parser, add_data, positive_int
from mtp_jax.errors import counted
from mtp_jax.run.audit import Audit, RowPiece, audit


def main(argv: list[str]) -> int:
    """Runs the verb; 0 if every logged batch is that of seed and corpora.

    Raises:
      RunFailed: a batch is not the one that was trained on; the first that is not.
      UserError: no run, or not its corpora.
    """
    parser = Parser(
        "mtp-jax audit",
        "Make every logged batch of a run again and compare its hash with that in "
        "metrics.jsonl.",
    )
    parser.add_argument("--workdir", required=True, metavar="D", help="folder of a run")
    parser.add_argument(
        "--step",
        type=positive_int,
        metavar="S",
        help="also name what the batch of a step holds",
    )
    add_data(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    found = audit(args.workdir, step=args.step, data=args.data)
    if args.json:
        print(json.dumps(_object(found)))
        return 0
    for i, row in enumerate(found.rows or []):
        print(f"row {i}: {', '.join(map(_shown, row))}")
    starts = counted(found.runs, "start")
    print(
        f"{found.steps} of {found.last_step} batches are in metrics.jsonl, and are "
        f"those of seed and corpora; {starts} (config.log.every=1 has all "
        "batches there)"
    )
    return 0


def _object(found: Audit) -> dict[str, Any]:
    """The object of --json; `step` and `rows` are in it if a step was asked for."""
    fields = dataclasses.asdict(found)
    asked = found.step is not None
    return {k: v for k, v in fields.items() if asked or k not in ("step", "rows")}


def _shown(piece: RowPiece) -> str:
    return f"{piece.name} [{piece.begin}:{piece.end}] of {piece.source}"
