"""Runs a program that is not trusted, and does with it what its judge asks for.

This runs inside the sandbox, beside the program, which may do to it what it likes: all
that it can say are results of calls. It is alone with the standard library of whatever
Python is there, 3.8 or newer.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
import types
from typing import Any

from mtp_jax.sandbox.wire import decode, encode, receive, send

_MOST_ITEMS = 1_000_000  # of an iterator that a test asks for


def limit(limits: dict[str, int]) -> None:
    """Sets limits for this process, which it cannot raise again.

    Args:
      limits: name of a resource, as `AS`, and its limit.
    """
    for name, most in limits.items():
        which = getattr(resource, "RLIMIT_" + name)
        now = resource.getrlimit(which)[1]
        if now != resource.RLIM_INFINITY:
            most = min(most, now)
        resource.setrlimit(which, (most, most))
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)


def serve(job: dict[str, Any], requests: int, answers: int) -> None:
    """Runs the program, then answers requests until there are no more.

    Args:
      job: `code`, the program.
      requests, answers: file descriptors.
    """
    asked, told = os.fdopen(requests, "rb"), os.fdopen(answers, "wb")
    program = types.ModuleType("program")
    sys.modules["program"] = program  # dataclasses look for the module of a class
    space = program.__dict__
    try:
        exec(compile(job["code"], "<program>", "exec"), space)
    except BaseException as error:
        send(told, _failure(error))
        return
    send(told, {"value": None})
    host = _Host(space)
    while True:
        request = receive(asked)
        try:
            answer = host.answer(request)
        except BaseException as error:
            answer = _failure(error)
        send(told, answer)


def run_script(job: dict[str, Any]) -> None:
    """Runs the program as a script, on the standard input and output it was given."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(job["code"], "<program>", "exec"), main.__dict__)


def _failure(error: BaseException) -> dict[str, str]:
    try:
        text = str(error)[:300]
    except BaseException:
        text = ""
    return {"error": type(error).__name__, "text": text}


class _Host:
    """The objects of a program, and what can be done with them from outside."""

    def __init__(self, space: dict[str, Any]):
        self._space = space
        self._objects: list[Any] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a request asks for; its result in JSON's types."""
        target = self._target(request["on"])
        do = request["do"]
        if do == "call":
            return self._call(target, request)
        given = [self._value(x) for x in request["args"]]
        if do == "items":
            value: Any = list(itertools.islice(target, _MOST_ITEMS))
        elif do == "setattr":
            setattr(target, *given)
            value = None
        else:
            plain = {"getattr": getattr, "len": len, "get": None}[do]
            value = plain(target, *given) if plain else target[given[0]]
        return {"value": self._coded(value)}

    def _call(self, target: Any, request: dict[str, Any]) -> dict[str, Any]:
        args = [self._value(x) for x in request["args"]]
        named = {name: self._value(x) for name, x in request["named"].items()}
        value = target(*args, **named)
        answer = {"value": self._coded(value)}
        after = [self._coded(x) for x in args]
        if after != request["args"]:  # the program changed what it was given
            answer["args"] = after
        return answer

    def _target(self, on: Any) -> Any:
        return self._space[on] if isinstance(on, str) else self._objects[on]

    def _value(self, coded: Any) -> Any:
        return decode(coded, self._target)

    def _coded(self, value: Any) -> Any:
        return encode(value, self._keep)

    def _keep(self, value: Any) -> int:
        for number, other in enumerate(self._objects):
            if other is value:
                return number
        self._objects.append(value)
        return len(self._objects) - 1
