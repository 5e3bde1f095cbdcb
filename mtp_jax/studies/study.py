"""A study: its arms, what a trial of one measures, and claims with their rules."""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.eval.intervals import mean_interval
from mtp_jax.studies import STUDIES

Size = Literal["tiny", "quick", "full"]
Figures = dict[str, Any]  # numbers by name, and lists of them, which no table shows
Verdict = Literal["reproduced", "refuted", "not decided"]
LEAST_SEEDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """An arm with a seed: what a study measures at a time."""

    arm: str
    seed: int  # of parameters and of the order of data, which all arms share
    size: Size
    folder: pathlib.Path  # of this trial, which is there
    shared: pathlib.Path  # of all trials of this study, which is there, for data
    steps: int | None = None  # of training, instead of those of the size
    data: tuple[str, ...] = ()  # prepared corpora, instead of the study's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim, and the rule that decides it.

    `of` gives a number for a seed from the figures of its arms, so that arms are
    compared at equal seeds. The claim is reproduced if the 95% interval of its mean
    lies wholly on its side of `than`, refuted if it lies wholly on the other, and else,
    or with fewer than three seeds, not decided.
    """

    says: str
    of: Callable[[Mapping[str, Figures]], float]
    side: Literal["above", "below"]
    than: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A claim with its verdict, and the number that it depends on."""

    claim: Claim
    verdict: Verdict
    mean: float  # over seeds; NaN if there are none
    low: float  # ends of the 95% interval
    high: float
    seeds: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Arms, what a trial measures, what tables show, and claims."""

    about: str  # what the figures mean, for the page of results
    arms: Callable[[Size], tuple[str, ...]]  # those that run if none are named
    measure: Callable[[Trial], Figures]
    shown: tuple[str, ...]  # figures of the table, the primary one first
    shares: tuple[str, ...] = ()  # of these, which are 0 or 1: a share of seeds
    base: str = ""  # the arm with which the others are compared, seed by seed
    claims: tuple[Claim, ...] = ()
    seeds: Callable[[Size], int] = lambda size: 3 if size == "full" else 1
    more_arms: tuple[str, ...] = ()  # run only if they are named


def find_study(name: str) -> Study:
    """Returns the study of that name.

    Raises:
      UserError: there is none.
    """
    if name not in STUDIES:
        raise UserError(f"{name!r} is not a study; there are {', '.join(STUDIES)}.")
    return importlib.import_module(f"mtp_jax.studies.{name}").STUDY


def difference(arm: str, base: str, figure: str) -> Callable[[Any], float]:
    """The figure of an arm less that of another, as a claim's `of`."""
    return lambda arms: arms[arm][figure] - arms[base][figure]


def quotient(arm: str, base: str, figure: str) -> Callable[[Any], float]:
    """The figure of an arm over that of another, as a claim's `of`."""
    return lambda arms: arms[arm][figure] / arms[base][figure]


def distance(arm: str, base: str, figure: str) -> Callable[[Any], float]:
    """How far the figures of two arms are apart, as a claim's `of`."""
    return lambda arms: abs(arms[arm][figure] - arms[base][figure])


def figure_of(arm: str, figure: str) -> Callable[[Any], float]:
    """The figure of an arm, as a claim's `of`."""
    return lambda arms: arms[arm][figure]


def judge(claim: Claim, by_seed: Mapping[int, Mapping[str, Figures]]) -> Judged:
    """The verdict of a claim.

    Args:
      claim: what is judged.
      by_seed: figures of the arms of every seed; seeds that lack an arm or a figure of
        the claim do not count.
    """
    values = []
    for arms in by_seed.values():
        try:
            values.append(float(claim.of(arms)))
        except KeyError:
            continue
    if not values:
        nan = float("nan")
        return Judged(
            claim=claim, verdict="not decided", mean=nan, low=nan, high=nan, seeds=0
        )
    mean, low, high = mean_interval(np.array(values))
    verdict: Verdict = "not decided"
    if len(values) >= LEAST_SEEDS:
        ends = (low, high) if claim.side == "above" else (-high, -low)
        than = claim.than if claim.side == "above" else -claim.than
        if ends[0] > than:
            verdict = "reproduced"
        elif ends[1] < than:
            verdict = "refuted"
    return Judged(
        claim=claim, verdict=verdict, mean=mean, low=low, high=high, seeds=len(values)
    )
