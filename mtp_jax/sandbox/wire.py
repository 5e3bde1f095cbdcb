"""Plain data between a program and its judge, a JSON text a line.

Only data crosses: what is read is numbers, texts and containers of built-in types,
whatever the other side sent. An object of another type stays where it is, and the other
side gets its number. This file also runs in the sandbox, on any Python from 3.8 on.
"""

from __future__ import annotations

import builtins
import collections
import importlib
import json
import sys
from typing import Any, Callable  # noqa: UP035, which a Python of 3.8 lacks

LONGEST = 1 << 23  # bytes of a line
# Modules that are read only where they are needed: they take longer than all the rest.
_RARE = (
    ("datetime", "datetime"),
    ("datetime", "date"),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
)


def encode(value: Any, handle: Callable[[Any], Any]) -> Any:
    """A value in JSON's types.

    Args:
      value: anything.
      handle: gives an object of a type that is no data a number, or has its name.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float, str)):
        plain = [kind for kind in (int, float, str) if isinstance(value, kind)]
        return plain[0](value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        kept = "bytes" if isinstance(value, bytes) else "bytearray"
        return {kept: bytes(value).hex()}
    for container in (list, tuple, set, frozenset, collections.deque):
        if isinstance(value, container):
            return {container.__name__: [encode(x, handle) for x in value]}
    if isinstance(value, dict):
        pairs = [[encode(k, handle), encode(v, handle)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    name = str(getattr(value, "__name__", ""))
    if isinstance(value, type) and vars(builtins).get(name) is value:
        return {"type": name}
    for module, kind in _RARE:  # who has such a value has read the module
        there = sys.modules.get(module)
        if there is not None and isinstance(value, getattr(there, kind)):
            return {kind: value.isoformat() if module == "datetime" else str(value)}
    return {"handle": handle(value)}


def decode(value: Any, of_handle: Callable[[Any], Any]) -> Any:
    """The value of what `encode` made; `of_handle` turns numbers or names into objects.

    Raises:
      ValueError, TypeError, KeyError, ArithmeticError: not what `encode` makes.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list without its type")
        return value
    [(kind, data)] = value.items()
    containers = {
        "list": list,
        "tuple": tuple,
        "set": set,
        "frozenset": frozenset,
        "deque": collections.deque,
    }
    if kind in containers:
        return containers[kind](decode(x, of_handle) for x in data)
    if kind == "dict":
        return {decode(k, of_handle): decode(v, of_handle) for k, v in data}
    for module, rare in _RARE:
        if kind == rare:
            of_kind = getattr(importlib.import_module(module), kind)
            return (
                of_kind.fromisoformat(data) if module == "datetime" else of_kind(data)
            )
    simple = {
        "complex": lambda: complex(*data),
        "bytes": lambda: bytes.fromhex(data),
        "bytearray": lambda: bytearray.fromhex(data),
        "range": lambda: range(*data),
        "type": lambda: _built_in(data),
        "handle": lambda: of_handle(data),
    }
    return simple[kind]()


def _built_in(name: str) -> type:
    found = vars(builtins)[name]
    if not isinstance(found, type):
        raise ValueError(f"{name} is no type")
    return found


def send(file: Any, message: Any) -> None:
    """Writes a message to a binary file and flushes it."""
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def receive(file: Any) -> Any:
    """Reads a message.

    Raises:
      EOFError: the other side is gone, or said too much at once.
      ValueError, RecursionError: what it said is no JSON.
    """
    line = file.readline(LONGEST + 1)
    if not line.endswith(b"\n"):
        raise EOFError("too long an answer" if line else "no answer")
    return json.loads(line)
