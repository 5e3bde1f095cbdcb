"""The tables of docs/performance.md from the results of `benchmarks/gpu.sh`.

What was not measured says so. Where a case has several results, the last one counts.

python -m benchmarks.gpu.tables gpu.jsonl
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.timing import script
from mtp_jax.cli.args import Parser
from mtp_jax.errors import UserError

Row = dict[str, Any]

NOT_MEASURED = "not measured"
# Shape, heads, form of their losses; a loop over the trunk's layers, or none.
_CASES = [("1.3b", 4, "fused", "auto"), ("1.3b", 1, "fused", "auto"),
          ("1.3b", 4, "fused", "yes"), ("1.3b", 8, "fused", "yes"),
          ("1.3b", 4, "remat", "auto"), ("1.3b", 4, "naive", "auto"),
          ("0.3b", 4, "fused", "auto"), ("0.3b", 1, "fused", "auto")]  # fmt: skip
_DECODED = [(shape, batch) for shape in ("1.3b", "7b") for batch in (1, 4, 16, 64)]


@script
def main(argv: list[str]) -> int:
    """Prints the tables in Markdown.

    Raises:
      UserError: a file that is not one of results.
    """
    parser = Parser("python -m benchmarks.gpu.tables", "Tables of GPU figures.")
    parser.add_argument("file", nargs="?", help="of results; none: nothing measured")
    args = parser.parse_args(argv)
    print("\n".join(tables(_read(args.file) if args.file else [])))
    return 0


def tables(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: where it ran, equality, training, decoding, a profile."""
    return [
        *_where(rows),
        "",
        *_equality(rows),
        "",
        *_training(rows),
        "",
        *_decoding(rows),
        "",
        *_profile(rows),
    ]


def _read(path: str) -> list[Row]:
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a file of results: {error}.") from error
    if not all(isinstance(row, dict) and "part" in row for row in rows):
        raise UserError(f"{path} has lines that are no results.")
    return rows


def _where(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["On GPUs: not measured. `benchmarks/gpu.sh` measures."]
    devices = sorted({row["device"] for row in rows} - {"none", "gpu"})
    jax = sorted({row["jax"] for row in rows if row.get("jax")})
    rehearsed = any(row.get("rehearsed") for row in rows)
    of = " (a rehearsal at tiny shapes)" if rehearsed else ""
    return [f"{', '.join(devices)}{of}, jax {', '.join(jax)}, `benchmarks/gpu.sh`."]


def _equality(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["part"] == "equality"]
    if not found:
        return [f"Equality checks: {NOT_MEASURED}."]
    told = []
    for row in found:
        of = f"{row['what']}{', ' + row['dtype'] if 'dtype' in row else ''}"
        if "error" in row:
            told.append(f"{of}: {row['error']}")
        elif "equal" in row:
            told.append(f"{of}: {row['equal']} of {row['texts']} texts")
        else:
            told.append(f"{of}: {row['grad_error']:.1e} (limit {row['limit']:.0e})")
    return [f"- {line}" for line in told]


def _training(rows: Sequence[Row]) -> list[str]:
    theirs = {row["shape"]: row for row in _of(rows, "torch_training")}
    lines = []
    for name, n, head_loss, scan in _CASES:
        case = {"shape": name, "n": n, "head_loss": head_loss, "scan_layers": scan}
        row = _last(rows, "training", **case)
        torch = theirs.get(name, {})
        speed = None
        if n == 1 and "tokens_per_s" in row and "tokens_per_s" in torch:
            speed = row["tokens_per_s"] / torch["tokens_per_s"]
        one = _last(rows, "training", **{**case, "n": 1, "head_loss": "fused"})
        steps = None
        if "step_s" in row and "step_s" in one and n > 1:
            flops = row["executed_flops_per_step"] / one["executed_flops_per_step"]
            steps = row["step_s"] / one["step_s"] / flops
        lines.append(
            (
                f"{name}, n={n}, {head_loss}" + (", loop" if scan == "yes" else ""),
                _number(row, "tokens_per_s", "{:,.0f}"),
                _number(row, "peak_share", "{:.2f}"),
                _gib(row, "peak_bytes"),
                _gib(row, "planned_bytes"),
                "" if n == 1 else _shown(steps, "{:.2f}"),
                _shown(speed, "{:.2f}") if n == 1 else "",
            )
        )
    head = ("model", "tokens/s", "share of the peak", "peak, GiB", "planned, GiB",
            "time to n=1, over FLOPs", "speed to torch")  # fmt: skip
    return _table(head, lines)


def _decoding(rows: Sequence[Row]) -> list[str]:
    lines = []
    for name, batch in _DECODED:
        row = _last(rows, "decoding", shape=name, batch=batch)
        others = [
            _last(rows, part, shape=name, batch=batch)
            for part in ("torch_decoding", "vllm_decoding")
        ]
        lines.append(
            (
                f"{name}, {batch}",
                _number(row, "plain_tokens_per_s", "{:,.0f}"),
                _number(row, "drafting_tokens_per_s", "{:,.0f}"),
                _number(row, "quotient", "{:.2f}"),
                _number(row, "bound", "{:.2f}"),
                _number(row, "share", "{:.2f}"),
                *(_number(other, "tokens_per_s", "{:,.0f}") for other in others),
            )
        )
    head = ("model, batch", "plain, tokens/s", "drafting at 3.5 a pass", "quotient",
            "bound", "share", "transformers", "vLLM")  # fmt: skip
    return _table(head, lines)


def _profile(rows: Sequence[Row]) -> list[str]:
    row = _last(rows, "profile")
    if not row.get("largest"):
        return [f"Profile of a step: {row.get('error', NOT_MEASURED)}."]
    return [
        f"Profile of a step ({row['shape']}, n={row['n']}), shares of the busy time: "
        + "".join(f"{kind} {share:.1%}, " for kind, share in row["shares"].items())
        + f"exposed collectives {row['exposed']:.1%}; the largest kernels:",
        *(f"- {x['share']:.1%} `{x['kernel']}`" for x in row["largest"]),
    ]


def _of(rows: Iterable[Row], part: str, **wanted: Any) -> list[Row]:
    return [
        row
        for row in rows
        if row["part"] == part and all(row.get(k) == v for k, v in wanted.items())
    ]


def _last(rows: Iterable[Row], part: str, **wanted: Any) -> Row:
    found = _of(rows, part, **wanted)
    return found[-1] if found else {}


def _shown(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else form.format(value)


def _number(row: Row, name: str, form: str) -> str:
    return _shown(row.get(name), form)


def _gib(row: Row, name: str) -> str:
    size = row.get(name)
    return _shown(None if size is None else size / 2**30, "{:.1f}")


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
