"""Kinds of tasks: a file of data, how its rows become examples, how answers count.

A task is data: its name, the files and columns that it reads, and small functions. A
user's own is a Python file with `TASK = ChoiceTask(...)` or another of these in it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from mtp_jax.sandbox.programs import Program

Row = dict[str, Any]
Example = TypeVar("Example")


@dataclasses.dataclass(frozen=True)
class Form(Generic[Example]):
    """One way in which files of a task are written."""

    columns: tuple[str, ...]  # that a row must have
    make: Callable[[Row], Example]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice: the model takes the continuation that it finds most likely."""

    contexts: tuple[str, ...]  # one a choice; mostly the same one
    continuations: tuple[str, ...]
    gold: int  # number of the right choice
    lengths: tuple[int, ...]  # characters of each choice, by which `acc_norm` divides


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to answer in words."""

    prompt: str
    answers: tuple[str, ...]  # each is right
    shown: str = ""  # the text that follows the prompt where it is an example


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem to solve by code."""

    prompt: str
    program: Callable[[str], Program]  # of a completion, to be judged
    reference: str | None = None  # a completion that solves it
    shown: str = ""  # the text that follows the prompt where it is an example


def first_rows(rows: Sequence[Row], shots: int) -> tuple[list[Row], list[Row]]:
    """Examples for the prompt, the first rows, and the others, which are measured."""
    return list(rows[:shots]), list(rows[shots:])


@dataclasses.dataclass(frozen=True)
class ChoiceTask:
    """Choices by likelihood, as lm-evaluation-harness has them.

    Metrics are `acc`, by the sum of log-probabilities, and `acc_norm`, by that over the
    characters of the choice.
    """

    name: str
    files: tuple[str, ...]  # names that its data may have in a folder
    forms: tuple[Form[Choice], ...]
    main: str = "acc"  # the metric that papers quote


@dataclasses.dataclass(frozen=True)
class AnswerTask:
    """Texts that the model writes, compared with right ones."""

    name: str
    files: tuple[str, ...]
    forms: tuple[Form[Question], ...]
    score: Callable[[str, tuple[str, ...]], dict[str, float]]
    main: str  # the metric that papers quote
    stop: tuple[str, ...]
    max_new_tokens: int
    before: str = ""  # text in front of all prompts
    shots: int = 0  # examples in the prompt
    between: str = "\n\n"  # them
    split: Callable[[Sequence[Row], int], tuple[list[Row], list[Row]]] = first_rows
    repeated: bool = False  # pass@k of several samples makes sense


@dataclasses.dataclass(frozen=True)
class CodeTask:
    """Programs that the model writes, judged in a sandbox: pass@k."""

    name: str
    files: tuple[str, ...]
    forms: tuple[Form[Problem], ...]
    stop: tuple[str, ...]
    max_new_tokens: int
    before: str = ""
    shots: int = 0
    between: str = "\n\n"
    split: Callable[[Sequence[Row], int], tuple[list[Row], list[Row]]] = first_rows


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Texts whose every token is scored: bits per byte."""

    name: str
    files: tuple[str, ...]
    forms: tuple[Form[str], ...]
    main: str = "bits_per_byte"


Task = ChoiceTask | AnswerTask | CodeTask | TextTask
