"""Figures of tasks as tables for people."""

from collections.abc import Sequence
from typing import Any

from mtp_jax.eval.comparison import Compared, Difference


def task_lines(result: dict[str, Any]) -> list[str]:
    """Lines of a task's result: figures with 95% intervals, and what else counts."""
    name, n = result["task"], len(result["items"])
    lines = []
    for metric, found in result["metrics"].items():
        at = f" ({found['temperature']:g})" if "temperature" in found else ""
        lines.append(
            f"{name}  {metric}{at}  {found['value']:.4f}  "
            f"[{found['low']:.4f}, {found['high']:.4f}]  of {n}"
        )
    if result.get("truncated"):
        what = "texts" if "drafting" not in result else "prompts"
        lines.append(
            f"{name}: {result['truncated']} {what} were longer than the model reads, "
            "and cut from the left"
        )
    if "drafting" in result:
        lines.append(f"{name}: {drafting_line(result['drafting'])}")
    return lines


def drafting_line(drafting: dict[str, Any]) -> str:
    """Says how texts were written, and what drafts saved."""
    name = drafting["decoder"]["name"]
    line = f"written by {name}, {drafting['tokens_per_forward']:.2f} tokens a pass"
    speeds = drafting.get("tokens_per_s")
    if speeds is None:
        return line
    [other] = [kind for kind in speeds if kind != "plain"]
    ratio = speeds[other] / speeds["plain"]
    if name == "plain":
        return f"{line}; {other} had {ratio:.2f} times its speed on the first batch"
    return (
        f"{line}, {100 * (1 - 1 / ratio):.0f}% less time than plain on the first batch"
    )


def comparison_table(rows: Sequence[Compared], names: Sequence[str]) -> list[list[str]]:
    """Cells of tasks by runs, a header first; differences are to the first run."""
    header = ["task", "metric", *names]
    header += [f"{name} - {names[0]}" for name in names[1:]]
    table = [header]
    for row in rows:
        cells = [row.task, row.metric]
        cells += ["-" if x is None else f"{x:.4f}" for x in row.values]
        table.append([*cells, *map(_difference, row.differences)])
    return table


def comparison_lines(rows: Sequence[Compared], names: Sequence[str]) -> list[str]:
    """A table, a line a task and metric; differences are to the first run."""
    table = comparison_table(rows, names)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
             for line in table]  # fmt: skip
    return [*lines, "differences with 95% intervals; *: the interval leaves out 0"]


def _difference(found: Difference | str | None) -> str:
    if found is None:
        return "-"
    if isinstance(found, str):
        return found
    mark = "*" if found.certain else ""
    return f"{found.value:+.4f}{mark} [{found.low:+.4f}, {found.high:+.4f}]"
