"""Results of a study as a page: means over seeds, paired differences, verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.errors import counted
from mtp_jax.eval.intervals import mean_interval, share_interval
from mtp_jax.studies.study import Figures, Judged, Study, judge

Rows = Sequence[Mapping[str, Any]]  # of a study's JSONL file


def by_seed(rows: Rows) -> dict[int, dict[str, Figures]]:
    """The figures of the rows by seed and arm."""
    found: dict[int, dict[str, Figures]] = {}
    for row in rows:
        found.setdefault(row["seed"], {})[row["arm"]] = row["figures"]
    return found


def verdicts(study: Study, rows: Rows) -> list[Judged]:
    """The verdict of every claim of a study."""
    figures = by_seed(rows)
    return [judge(claim, figures) for claim in study.claims]


def page(name: str, study: Study, rows: Rows) -> str:
    """A page in Markdown, whose tables are aligned, too.

    Args:
      name: of the study.
      study: what it is.
      rows: of its JSONL file.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    seeds = len({row["seed"] for row in rows})
    seconds = sum(row["seconds"] for row in rows)
    parts = [
        f"# {name}\n\n{study.about}\n",
        f"{counted(seeds, 'seed')}, {counted(len(rows), 'trial')}, "
        f"{seconds / 60:.1f} minutes; means, and 95% intervals by resampling seeds.\n",
        _table(
            ("arm", "seeds", *study.shown),
            [(arm, *_figures(rows, arm, study)) for arm in arms],
        ),
    ]
    compared = [arm for arm in arms if arm != study.base]
    if study.base in arms and compared:
        parts += [
            f"\nLess {study.base}, seed by seed:\n",
            _table(
                ("arm", "seeds", *study.shown),
                [(arm, *_apart(rows, arm, study)) for arm in compared],
            ),
        ]
    if study.claims:
        parts += ["\nClaims, and rules that were written before any run:\n"]
        parts += [_table(_OF_CLAIMS, [_claim(j) for j in verdicts(study, rows)])]
    return "\n".join(parts) + "\n"


_OF_CLAIMS = ("claim", "if", "found", "seeds", "verdict")


def _claim(judged: Judged) -> tuple[str, ...]:
    claim = judged.claim
    return (
        claim.says,
        f"{claim.side} {claim.than:.4g}",
        _told((judged.mean, judged.low, judged.high), judged.seeds),
        str(judged.seeds),
        judged.verdict,
    )


def _figures(rows: Rows, arm: str, study: Study) -> list[str]:
    of_arm = [row["figures"] for row in rows if row["arm"] == arm]
    told = [str(len(of_arm))]
    for name in study.shown:
        tell = _share if name in study.shares else _mean
        told.append(tell([x[name] for x in of_arm if name in x]))
    return told


def _apart(rows: Rows, arm: str, study: Study) -> list[str]:
    pairs = [
        (arms[arm], arms[study.base])
        for arms in by_seed(rows).values()
        if arm in arms and study.base in arms
    ]
    return [
        str(len(pairs)),
        *(
            _mean([a[name] - b[name] for a, b in pairs if name in a and name in b])
            for name in study.shown
        ),
    ]


def _mean(values: Sequence[float]) -> str:
    return _told(mean_interval(np.array(values)), len(values)) if values else ""


def _share(values: Sequence[float]) -> str:
    if not values:
        return ""
    return _told(share_interval(round(sum(values)), len(values)), len(values))


def _told(interval: tuple[float, float, float], seeds: int) -> str:
    mean, low, high = (_number(x) for x in interval)
    return mean if seeds < 2 else f"{mean} ({low}..{high})"


def _number(x: float) -> str:
    """Four decimals of what people compare; small and large numbers as powers."""
    return f"{x:.4f}" if x == 0 or 1e-3 <= abs(x) < 1e5 else f"{x:.2e}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown with aligned columns, the first and text to the left."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (w + 2) for w in widths)}|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
