"""Numbers of each head over the steps: a table, or a name that makes one.

A field of such numbers is a tuple. It may hold

  nothing: every number is 1;
  n numbers: one a head, at every step;
  rows (step, one number a head), from step 0 on: between the steps of two rows the
    numbers lie on the line between them, and after the last row they stay;
  a name and its settings, as ("linear", 0.3, 0.1); what each makes is in `NAMED`.

In those with a name head 1 always has 1, so that n does not change its share. The step
is the number of steps done before; s is its share of all steps.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from mtp_jax.config.checks import require

Entries = tuple[str | float | tuple[float, ...], ...]
_KNOTS = 256  # of a curve; lines between them are off by less than 1e-4 of its height


@dataclasses.dataclass(frozen=True)
class Table:
    """A number of each head at some steps; on lines in between, level at the end."""

    steps: tuple[int, ...]  # rising, the first is 0
    rows: tuple[tuple[float, ...], ...]  # one a step, of n numbers

    def ever_zero(self) -> tuple[bool, ...]:
        """For each head whether its number is 0 at some step."""
        return tuple(min(column) == 0 for column in zip(*self.rows, strict=True))

    def always_zero(self) -> tuple[bool, ...]:
        """For each head whether its number is 0 at every step."""
        return tuple(max(column) == 0 for column in zip(*self.rows, strict=True))

    def constant(self, value: float) -> bool:
        """True if every number is `value` at every step."""
        return all(x == value for row in self.rows for x in row)


_OF_HEADS = "heads (config.model.n_future_tokens)"


def table_of(
    field: str, entries: Entries, n: int, steps: int, of: str = _OF_HEADS
) -> Table:
    """The table that the entries of a field stand for.

    Args:
      field: its name, for errors.
      entries: what it holds.
      n: numbers of a row, one a head.
      steps: of the run; a named schedule reaches its end with them.
      of: what the numbers of a row are of, for errors.

    Raises:
      UserError: they are none of the forms above, or a number is below 0.
    """
    if not entries:
        return Table((0,), ((1.0,) * n,))
    if isinstance(entries[0], str):
        return _named(field, entries[0], entries[1:], n, steps)
    if all(isinstance(x, int | float) for x in entries):
        _check_row(field, entries, n, of)
        return Table((0,), (entries,))  # type: ignore[arg-type]
    return _from_rows(field, entries, n, of)


def _check_row(field: str, row: Any, n: int, of: str) -> None:
    require(len(row) == n, f"{field} has {len(row)} values for {n} {of}.")
    require(
        all(0 <= x < math.inf for x in row),
        f"{field} must be 0 or more, and has "
        f"{', '.join(f'{x:g}' for x in row if not 0 <= x < math.inf)}.",
    )


def _from_rows(field: str, rows: Entries, n: int, of: str) -> Table:
    for row in rows:
        require(
            isinstance(row, tuple) and len(row) > 0,
            f"{field} holds {row!r}; it must be rows (step, one number a head), n "
            f"numbers, or a name of {', '.join(NAMED)}.",
        )
    found: list[tuple[float, ...]] = [row for row in rows if isinstance(row, tuple)]
    starts = [row[0] for row in found]
    require(
        starts[0] == 0,
        f"{field} begins at step {starts[0]:g}; its first row must be of step 0.",
    )
    require(
        all(a < b for a, b in itertools.pairwise(starts))
        and all(start == int(start) for start in starts),
        f"{field} has rows of the steps {', '.join(f'{x:g}' for x in starts)}; they "
        "must be whole and rise.",
    )
    for row in found:
        _check_row(f"{field}, row of step {row[0]:g},", row[1:], n, of)
    return Table(tuple(map(int, starts)), tuple(row[1:] for row in found))


def _curve(value: Callable[[float], float]) -> Callable[[int, int], Table]:
    """Heads 2 to n follow a function of s, by lines between some of its points."""

    def made(n: int, steps: int) -> Table:
        knots = sorted({round(steps * k / _KNOTS) for k in range(_KNOTS + 1)})
        rows = tuple((1.0,) + (value(k / steps),) * (n - 1) for k in knots)
        return Table(tuple(knots), rows)

    return made


def _line(a: float, b: float) -> Callable[[int, int], Table]:
    def made(n: int, steps: int) -> Table:
        return Table((0, steps), ((1.0,) + (a,) * (n - 1), (1.0,) + (b,) * (n - 1)))

    return made


def _level(values: Callable[[int], tuple[float, ...]]) -> Callable[[int, int], Table]:
    return lambda n, steps: Table((0,), (values(n),))


def _two_phase(a: float, b: float, share: float) -> Callable[[int, int], Table]:
    def made(n: int, steps: int) -> Table:
        phases = [(0, (1.0,) + (a,) * (n - 1))]
        phases.append((round(share * steps), (1.0,) + (b,) * (n - 1)))
        return _jumps(phases)

    return made


def _head_count(count: Callable[[int, int], int]) -> Callable[[int, int], Table]:
    """Head counts by stage, of n stages of equal length (arXiv:2505.22757)."""

    def made(n: int, steps: int) -> Table:
        phases = []
        for stage in range(n):
            k = count(n, stage)
            phases.append((-(-stage * steps // n), (1.0,) * k + (0.0,) * (n - k)))
        return _jumps(phases)

    return made


def _warmup(length: float) -> Callable[[int, int], Table]:
    def made(n: int, steps: int) -> Table:
        end = max(1, round(length))
        return Table((0, end), ((1.0,) + (0.0,) * (n - 1), (1.0,) * n))

    return made


def _jumps(phases: list[tuple[int, tuple[float, ...]]]) -> Table:
    """A table that changes from one step to the next, where a phase begins."""
    at: dict[int, tuple[float, ...]] = {}
    for start, row in phases:
        before = [step for step in at if step < start]
        if before and start - 1 not in at:
            at[start - 1] = at[max(before)]
        at[start] = row
    steps = tuple(sorted(at))
    return Table(steps, tuple(at[step] for step in steps))


# How many settings each name takes, their usual values, and the table that it makes.
NAMED: dict[str, tuple[tuple[float, ...], Callable[..., Callable[[int, int], Table]]]]
NAMED = {
    # Heads 2 to n have c.
    "constant": ((1.0,), lambda c: _level(lambda n: (1.0,) + (c,) * (n - 1))),
    # Head i has gamma^(i-1).
    "decay": ((0.6,), lambda g: _level(lambda n: tuple(g**i for i in range(n)))),
    # Heads 2 to n have lambda / (n - 1) (DeepSeek-V3, arXiv:2412.19437, section 2.2).
    "share": (
        (0.3,),
        lambda a: _level(lambda n: (1.0,) + (a / max(n - 1, 1),) * (n - 1)),
    ),
    # a + (b - a) s.
    "linear": ((0.3, 0.1), _line),
    # b + (a - b) (1 + cos(pi s)) / 2.
    "cosine": (
        (0.3, 0.1),
        lambda a, b: _curve(lambda s: b + (a - b) * (1 + math.cos(math.pi * s)) / 2),
    ),
    # a, and b from a share of the steps on (DeepSeek-V3, section 4.2: 10T of 14.8T).
    "two_phase": ((0.3, 0.1, 0.676), _two_phase),
    # a sin(pi s / 2), rising (Medusa's training code).
    "sine": ((1.0,), lambda a: _curve(lambda s: a * math.sin(math.pi * s / 2))),
    # One head first, then one more in each of n stages.
    "forward": ((), lambda: _head_count(lambda n, stage: stage + 1)),
    # All heads first, then one fewer in each of n stages.
    "reverse": ((), lambda: _head_count(lambda n, stage: n - stage)),
    # From 0 to 1 in so many steps.
    "warmup": ((1000.0,), _warmup),
}


def _named(field: str, name: str, settings: Any, n: int, steps: int) -> Table:
    require(
        name in NAMED,
        f"{field} is {name!r}; its names are {', '.join(NAMED)}, and numbers or rows "
        "need no name.",
    )
    usual, make = NAMED[name]
    require(
        len(settings) in (0, len(usual))
        and all(isinstance(x, int | float) and 0 <= x < math.inf for x in settings),
        f"{field} is {name} with {settings}; it takes {len(usual)} numbers of 0 or "
        f"more{', as ' + str(usual) if usual else ''}.",
    )
    require(
        name != "two_phase" or not settings or settings[2] <= 1,
        f"{field} is two_phase from {settings[-1] if settings else 0} of the steps on; "
        "give a share of at most 1.",
    )
    return make(*(settings or usual))(n, steps)
