"""Runs the tests of a program, which is in another sandbox and answers by messages.

Tests are part of a benchmark's data. They run here as they stand, but every function of
the program is a stand-in that asks the program's process. A program can answer wrongly,
or not at all; the verdict is written to a pipe that it does not have. It runs
on Python 3.8 or newer, with nothing but its standard library.
"""

from __future__ import annotations

import builtins
import os
from typing import Any

from mtp_jax.sandbox.wire import decode, encode, receive, send


def judge(job: dict[str, Any], answers: int, requests: int, verdict: int) -> None:
    """Runs all tests and writes a verdict: `passed`, and `why` it did not.

    Args:
      job: `setup`, code that stands before the tests; `names`, what of the program
        tests use; `tests`, code a test.
      answers, requests, verdict: file descriptors.
    """
    result = {"passed": False, "why": "the tests did not end"}
    try:
        program = _Program(os.fdopen(answers, "rb"), os.fdopen(requests, "wb"))
        program.wait()
        space: dict[str, Any] = {"__name__": "tests"}
        exec(compile(job["setup"], "<setup>", "exec"), space)
        for name in job["names"]:
            space[name] = _Remote(program, name)
        for test in job["tests"]:
            exec(compile(test, "<test>", "exec"), space)
        result = {"passed": True, "why": ""}
    except BaseException as error:
        text = " ".join(str(error).split())
        result["why"] = f"{type(error).__name__}: {text}"[:300].rstrip(": ")
    with os.fdopen(verdict, "wb") as file:
        send(file, result)


class ProgramError(Exception):
    """An error in the program of a kind that is no built-in one."""


class _Program:
    """The other end of the pipes."""

    def __init__(self, answers: Any, requests: Any):
        self._answers = answers
        self._requests = requests

    def wait(self) -> Any:
        """Reads the next answer; raises the error that it tells."""
        answer = receive(self._answers)
        if "error" in answer:
            kind = getattr(builtins, str(answer["error"]), None)
            text = str(answer.get("text", ""))
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    error = kind(text)
                except TypeError:  # one of a few that take more
                    error = ProgramError(f"{kind.__name__}: {text}")
                raise error
            raise ProgramError(f"{answer['error']}: {text}")
        return answer

    def ask(self, do: str, on: Any, *args: Any, **named: Any) -> Any:
        """Asks the program to do something with one of its objects."""
        coded = [self._coded(x) for x in args]
        of_name = {name: self._coded(x) for name, x in named.items()}
        message = {"do": do, "on": on, "args": coded, "named": of_name}
        send(self._requests, message)
        answer = self.wait()
        for given, after in zip(args, answer.get("args", ())):  # noqa: B905, old Python
            self._change(given, self._value(after))
        return self._value(answer["value"])

    def _change(self, given: Any, after: Any) -> None:
        """Makes a list, set or dict of a test what the program made of it."""
        if type(given) is not type(after):
            return
        if isinstance(given, list):
            given[:] = after
        elif isinstance(given, (dict, set)):
            given.clear()
            given.update(after)

    def _value(self, coded: Any) -> Any:
        return decode(coded, lambda number: _Remote(self, int(number)))

    def _coded(self, value: Any) -> Any:
        return encode(value, _number_of)


def _number_of(value: Any) -> Any:
    if isinstance(value, _Remote):
        return value._on
    raise TypeError(f"{type(value).__name__} cannot be given to a program")


class _Remote:
    """An object of the program, or a name of its."""

    def __init__(self, program: _Program, on: Any):
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_on", on)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._program.ask("call", self._on, *args, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("getattr", self._on, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("setattr", self._on, name, value)

    def __iter__(self) -> Any:
        return iter(self._program.ask("items", self._on))

    def __len__(self) -> int:
        return self._program.ask("len", self._on)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("get", self._on, key)

    def __bool__(self) -> bool:
        return True
