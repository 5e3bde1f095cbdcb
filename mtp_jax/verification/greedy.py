"""Compares greedy texts with drafts to those of plain decoding."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtp_jax.decode.generation import Generation
from mtp_jax.verification.exact_distribution import NextLogits


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first token at which a text is not that of plain decoding.

    `gap` is by how much head 1 prefers plain's token to the other one, by the forward
    pass of training; below 0 it prefers the other. None: one text ends where the other
    goes on for no reason that a token could tell.
    """

    prompt: int  # its number, from 0
    position: int  # of the new tokens, from 0
    plain: int | None
    other: int | None
    gap: float | None
    near_tie: bool  # rounding alone may decide between the two


def first_difference(
    number: int,
    prompt: Sequence[int],
    plain: Generation,
    other: Generation,
    eos_id: int,
    next_logits: NextLogits,
    tie: float,
) -> Difference | None:
    """The first difference of two greedy continuations; None if they are equal.

    Args:
      number: the number of the prompt.
      prompt: its token ids, begin of text first.
      plain: the continuation by plain decoding.
      other: the one to compare with it.
      eos_id: end of text, where a continuation does not say by which it ended.
      next_logits: from `exact_distribution.head_one`.
      tie: two logits that are no further apart are a near-tie.
    """
    a, b = (written(result, eos_id) for result in (plain, other))
    if a == b and plain.finish == other.finish:
        return None
    longer = max(len(a), len(b))
    at = next((i for i in range(longer) if a[i : i + 1] != b[i : i + 1]), longer)
    ours, theirs = (x[at] if at < len(x) else None for x in (a, b))
    if ours is None or theirs is None:
        return Difference(number, at, ours, theirs, None, False)
    logits_V = next_logits([[*prompt, *a[:at]]])[0].astype(np.float64)
    gap = float(logits_V[ours] - logits_V[theirs])
    # A near-tie is one between the two best, not between any two.
    lost = float(np.max(logits_V) - min(logits_V[ours], logits_V[theirs]))
    return Difference(number, at, ours, theirs, gap, lost <= tie)


def written(result: Generation, eos_id: int) -> list[int]:
    """The new tokens of a continuation, end of text included."""
    ended_by = eos_id if result.ended_by is None else result.ended_by
    return [*result.tokens, *[ended_by] * (result.finish == "eos")]
