"""Prompts as a list, in whatever form they are given, and their numbers."""

import dataclasses
from typing import Any

import jax
import numpy as np

from mtp_jax.errors import UserError

_SEEDS = 2**32  # numbers of prompts


@dataclasses.dataclass(frozen=True)
class WholePrompt:
    """Ids of a prompt as they are: nothing is put in front of them."""

    ids: np.ndarray  # integers [tokens]


def as_prompts(prompts: Any) -> list[Any]:
    """Returns a list of prompts, given as texts or as ids; one of them is a list, too.

    Raises:
      UserError: neither texts nor ids.
    """
    if isinstance(prompts, str | WholePrompt):
        return [prompts]
    if isinstance(prompts, bytes):
        raise UserError("a prompt is given as bytes; give a text, or token ids.")
    is_row = isinstance(prompts, np.ndarray | jax.Array) and prompts.ndim == 1
    if is_row or (
        len(prompts) and all(isinstance(x, int | np.integer) for x in prompts)
    ):
        return [prompts]
    return list(prompts)


def check_numbers(first: int, count: int) -> None:
    """Raises UserError if prompts have no numbers to draw by."""
    if not 0 <= first <= _SEEDS - count:
        raise UserError(f"first is {first}; prompts have numbers from 0 to 2^32 - 1.")
