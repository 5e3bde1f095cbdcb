"""A config as an editable tree, and the checked dataclasses made of it.

A file in `configs/` edits the tree that `default()` returns; `freeze()` checks the tree
and turns it into the dataclasses of `sections`, which is all that the rest of the
package ever sees.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, get_args, get_origin

from ml_collections import ConfigDict

from mtp_jax.config.names import did_you_mean
from mtp_jax.config.section_tree import PARTS_OF_MODEL, as_tree
from mtp_jax.config.sections import Config
from mtp_jax.errors import UserError


def default() -> ConfigDict:
    """The default run as an editable tree; a misspelt field raises at once."""
    return ConfigDict(as_tree(Config())).lock()


def freeze(tree: ConfigDict | dict[str, Any]) -> Config:
    """Checks an edited tree and turns it into the dataclasses.

    Raises:
      UserError: an unknown field, a wrong type, a value out of range, or values
        that contradict each other; the text names the field.
    """
    plain = tree.to_dict() if isinstance(tree, ConfigDict) else tree
    for name in PARTS_OF_MODEL:
        if isinstance(plain, dict) and name in plain:
            model = plain.get("model", {})
            if isinstance(model, dict) and name not in model:
                plain = {**plain, "model": {**model, name: plain[name]}}
                del plain[name]
    return _build(Config, plain, "config")


def _build(cls: type, tree: Any, path: str) -> Any:
    hints = typing.get_type_hints(cls)
    for name in PARTS_OF_MODEL:
        path = f"config.{name}" if path == f"config.model.{name}" else path
    if not isinstance(tree, dict):
        raise UserError(f"{path} is {tree!r}; it must be a section of fields.")
    for name in tree:
        if name not in hints:
            meant = did_you_mean(name, path.partition(".")[2])
            raise UserError(f"{path}.{name} is not a field{meant}")
    values = {}
    for name, value in tree.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(typing.cast(type, hint), value, f"{path}.{name}")
        else:
            values[name] = _checked(hint, value, f"{path}.{name}")
    return cls(**values)


def _checked(hint: Any, value: Any, path: str) -> Any:
    """`value` as `hint` says; an int is a float, a list is a tuple."""
    if get_origin(hint) is Literal:
        allowed = get_args(hint)
        _require(value in allowed, f"{path} is {value!r}; it must be one of {allowed}.")
        return value
    if get_origin(hint) is types.UnionType:
        return _one_of(get_args(hint), value, path)
    if get_origin(hint) is tuple:
        items = list(value) if isinstance(value, (list, tuple)) else None
        if items is None:
            raise UserError(f"{path} is {value!r}; it must be a tuple.")
        of = get_args(hint)[0]
        return tuple(_checked(of, v, f"{path}[{i}]") for i, v in enumerate(items))
    if hint is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    _require(
        type(value) is hint, f"{path} is {value!r}; it must be of type {hint.__name__}."
    )
    _require(
        hint is not float or math.isfinite(value),
        f"{path} is {value}; it must be a finite number.",
    )
    return value


def _one_of(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    """`value` as one of several hints says: a text, a number, or a list."""
    kinds: dict[Any, Any] = {str: str, float: (int, float), tuple: (list, tuple)}
    for hint in hints:
        plain = get_origin(hint) or hint
        if isinstance(value, kinds[plain]) and not isinstance(value, bool):
            return _checked(hint, value, path)
    shown = ", ".join((get_origin(hint) or hint).__name__ for hint in hints)
    raise UserError(f"{path} is {value!r}; it must be one of {shown}.")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)
