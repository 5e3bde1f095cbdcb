"""Runs side by side: figures of the same tasks, and what is more than chance.

Axes: P examples.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mtp_jax.errors import UserError
from mtp_jax.eval.intervals import difference_interval
from mtp_jax.storage import run_at


@dataclasses.dataclass(frozen=True)
class Difference:
    """A run's figure less that of the first run, of the same examples."""

    value: float
    low: float  # of the 95% interval, by resampling examples
    high: float

    @property
    def certain(self) -> bool:
        """True if the interval is on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclasses.dataclass(frozen=True)
class Compared:
    """One metric of one task in several runs; None where a run has it not."""

    task: str
    metric: str
    values: list[float | None]
    differences: list[Difference | str | None]  # to the first run; or why there is none


def compare_runs(workdirs: Sequence[str]) -> list[Compared]:
    """Compares results of `evaluate --tasks` in the folders `eval` of runs.

    Results are paired by their file's name, so by task and options, and their examples
    by their number; differences are to the first run that is given.

    Args:
      workdirs: at least two.

    Raises:
      UserError: fewer, a run without results, or nothing that two of them share.
    """
    if len(workdirs) < 2:
        raise UserError("--compare is for two runs or more.")
    found = [_results(workdir) for workdir in workdirs]
    names = [
        name
        for name in dict.fromkeys(name for results in found for name in results)
        if sum(name in results for results in found) > 1
    ]
    if not names:
        raise UserError(
            f"{', '.join(workdirs)} have no results of the same task and options; run "
            "evaluate --tasks on each of them."
        )
    return [
        _compared(name, metric, [results.get(name) for results in found])
        for name in names
        for metric in _metrics([results.get(name) for results in found])
    ]


def _results(workdir: str) -> dict[str, dict[str, Any]]:
    """Content of the files of results by their names."""
    folder = run_at(workdir)[0] / "eval"
    found = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            found[path.stem] = _checked(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{path} is no result of evaluate --tasks.") from None
    if not found:
        raise UserError(
            f"{epath.Path(workdir)} has no results of tasks; run evaluate "
            f"--workdir={workdir} --tasks=NAME first."
        )
    return found


def _checked(result: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(result, dict)
    for key in ("metrics", "items", "settings"):
        result[key]
    return result


def _metrics(results: list[dict[str, Any] | None]) -> list[str]:
    return list(dict.fromkeys(m for r in results if r for m in r["metrics"]))


def _compared(name: str, metric: str, results: list[dict[str, Any] | None]) -> Compared:
    found = [r["metrics"].get(metric) if r else None for r in results]
    values = [x["value"] if x else None for x in found]
    base = results[0]
    return Compared(
        name, metric, values, [_difference(base, r, metric) for r in results[1:]]
    )


def _has(result: dict[str, Any] | None, metric: str) -> bool:
    return result is not None and metric in result["metrics"]


def _difference(
    base: dict[str, Any] | None, other: dict[str, Any] | None, metric: str
) -> Difference | str | None:
    if (
        base is None
        or other is None
        or not (_has(base, metric) and _has(other, metric))
    ):
        return None
    if base["settings"]["sha256"] != other["settings"]["sha256"]:
        return "other data"
    of_base = {item["item"]: item for item in base["items"]}
    pairs = [(of_base[x["item"]], x) for x in other["items"] if x["item"] in of_base]
    of_base_P, of_other_P = (
        np.array([pair[side]["scores"][metric] for pair in pairs]) for side in (0, 1)
    )
    weights_P = np.array([x.get("weight", 1.0) for x, _ in pairs])
    return Difference(*difference_interval(of_other_P, of_base_P, weights_P))
