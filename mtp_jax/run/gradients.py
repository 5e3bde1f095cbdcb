"""Means of what a gradient meter has logged: which heads pull the trunk as head 1.

A head whose gradient at the trunk's output has a cosine above 0 with head 1's makes,
to first order, head 1's loss smaller with every step of its own. Axes: R records.
"""

import os

import numpy as np

from mtp_jax.errors import counted
from mtp_jax.eval.intervals import series_interval
from mtp_jax.run.log_columns import read_log
from mtp_jax.storage import workdir_at

Interval = tuple[float, float, float]  # mean, ends of the 95% interval
_FEWEST = 10
_COSINE = "gradient/cosine"


def helping(workdir: str | os.PathLike[str]) -> list[str]:
    """A line that tells which heads help head 1; none if no cosines are logged.

    A head helps if the interval of its mean cosine lies above 0, and hinders if it lies
    below. Fewer than ten records have no interval to speak of.
    """
    parts = []
    for head, found in _cosines(workdir, 0.5).items():
        mean, low, high = series_interval(found)
        verdict = "helps" if low > 0 else "hinders" if high < 0 else "not decided"
        told = f"({low:.3f}..{high:.3f}) {verdict}"
        if len(found) < _FEWEST:
            told = f"({counted(len(found), 'record')}: not decided)"
        parts.append(f"head {head} {mean:.3f} {told}")
    told = f"cosine with head 1's gradient into the trunk: {', '.join(parts)}"
    return [told] if parts else []


def mean_cosines(
    workdir: str | os.PathLike[str], first_share: float = 0.5
) -> dict[int, Interval]:
    """Mean cosine of each head's gradient with head 1's, with its interval, by head.

    Args:
      workdir: of a run with `config.loss.gradient_meter` or a balance; the result of
        another one is empty.
      first_share: of the run's steps, which are left out.
    """
    values = _cosines(workdir, first_share)
    return {head: series_interval(found) for head, found in values.items()}


def _cosines(
    workdir: str | os.PathLike[str], first_share: float
) -> dict[int, list[float]]:
    """The cosines of each head, a number a record."""
    log = read_log(workdir_at(os.fspath(workdir)) / "metrics.jsonl")
    late_R = log.step > first_share * max(log.step, default=0.0)
    values = {}
    for head in log.heads_of(_COSINE):
        column_R = log.column(f"{_COSINE}/head_{head}")
        if found := column_R[late_R & ~np.isnan(column_R)].tolist():
            values[head] = found
    return values
