"""Fields of other people's configs, each of the type that it must have.

A field of null is one that is not there. A number that is 0, or a text where a number
must be, is an error: a default in its place would make another model.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mtp_jax.errors import UserError

Fields = Mapping[str, Any]


def whole(
    fields: Fields, name: str, where: str, usual: int | None = None, least: int = 1
) -> int:
    """A whole number.

    Args:
      fields: of the config.
      name: of the field.
      where: the file, for errors.
      usual: where there is none; None if there must be one.
      least: what it must be at the least.

    Raises:
      UserError: it is missing, something else, or less.
    """
    value = _there(fields, name, where, usual)
    if type(value) is not int or value < least:
        raise UserError(
            f"{where}: {name} is {value!r}; it must be a whole number of at least "
            f"{least}."
        )
    return value


def real(fields: Fields, name: str, where: str, usual: float | None = None) -> float:
    """A number above 0; arguments and errors as of `whole`."""
    value = _there(fields, name, where, usual)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {name} is {value!r}; it must be a number above 0.")
    return float(value)


def truth(fields: Fields, name: str, where: str, usual: bool = False) -> bool:
    """True or false; arguments and errors as of `whole`."""
    value = _there(fields, name, where, usual)
    if type(value) is not bool:
        raise UserError(f"{where}: {name} is {value!r}; it must be true or false.")
    return value


def fields_in(fields: Fields, name: str, where: str) -> dict[str, Any]:
    """The fields of a field, without those of null; none if it is not there.

    Raises:
      UserError: it is something else.
    """
    value = _there(fields, name, where, {})
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {name} is {value!r}; it must be an object.")
    return {inner: x for inner, x in value.items() if x is not None}


@contextlib.contextmanager
def told_with(where: str) -> Iterator[None]:
    """A context whose errors of a model that cannot be name the file that asks for it.

    One that begins with the file stays as it is.

    Raises:
      UserError: one was raised.
    """
    try:
        yield
    except UserError as error:
        if str(error).startswith(where):
            raise
        raise UserError(f"{where} is of a model that cannot be: {error}") from None


def _there(fields: Fields, name: str, where: str, usual: Any) -> Any:
    value = fields.get(name)
    value = usual if value is None else value
    if value is None:
        raise UserError(f"{where} lacks the field {name}.")
    return value
