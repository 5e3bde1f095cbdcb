"""Values of `--config.section.field=value` as people write them."""

import ast
import decimal
import pathlib
import re
import typing
from typing import Any

from mtp_jax.config import Config, sections_of
from mtp_jax.config.optim import ByGroup
from mtp_jax.config.schedules import Entries
from mtp_jax.errors import UserError

_MOST_DIGITS = 18
_TRUTHS = dict.fromkeys(("true", "t", "yes", "y", "on", "1"), "True")
_TRUTHS |= dict.fromkeys(("false", "f", "no", "n", "off", "0"), "False")
# An item of a list: quoted, or up to the next comma.
_ITEM = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)"|([^,]*?))\s*(?:,|$)""")


def plain_overrides(arguments: list[str]) -> list[str]:
    """Returns the arguments, with values as the config library reads them.

    A whole number may be written 1e3; texts in a tuple need no quotes, whatever they
    look like; a text may have quotes around it; of one group and its number the outer
    brackets may be missing.

    Raises:
      UserError: a value of a field that is true or false is neither.
    """
    made = []
    rest = list(arguments)
    while rest:
        name, is_set, value = rest.pop(0).partition("=")
        hint = _hint_of(name)
        if not is_set and hint not in (None, bool) and rest:
            is_set, value = "=", rest.pop(0)
        if is_set and hint is bool:
            value = _truth(name, value)
        made.append(f"{name}={_plain(hint, value)}" if is_set else name)
    return made


def _hint_of(option: str) -> Any:
    """The type of the field that an option sets; None if it sets none."""
    match = re.fullmatch(r"--?config\.(\w+)\.(\w+)", option)
    if match is None:
        return None
    section = sections_of(Config()).get(match[1])
    return section and typing.get_type_hints(type(section)).get(match[2])


def _plain(hint: Any, value: str) -> str:
    if hint is int:
        return whole(value)
    if hint is str:
        return _unquoted(value)
    if hint == Entries and re.fullmatch(r"[a-z_]+", value.strip()):
        return repr((value.strip(),))  # a schedule by its name
    if hint == ByGroup and (pair := _one_pair(value)):
        return repr((pair,))
    if hint == tuple[str, ...]:
        return repr(_texts(value)) if value.strip() else value
    return value


def _one_pair(value: str) -> tuple[Any, ...]:
    """A group and its number without outer brackets; () if it is something else."""
    try:
        read = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return ()
    is_one = isinstance(read, tuple | list) and read and isinstance(read[0], str)
    return tuple(read) if is_one else ()


def _truth(name: str, value: str) -> str:
    word = _TRUTHS.get(_unquoted(value.strip()).lower())
    if word is None:
        field = name.lstrip("-")
        raise UserError(f"{field} is {value!r}; it must be True or False.")
    return word


def whole(value: str) -> str:
    """Returns a whole number written as 1e3 or 2.0 in digits, other text as it is."""
    try:
        number = decimal.Decimal(value)
        if number.is_finite() and number.adjusted() < _MOST_DIGITS:
            return str(int(number)) if number == int(number) else value
    except decimal.InvalidOperation:
        pass
    return value


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def _texts(value: str) -> tuple[str, ...]:
    """Texts from a tuple, a list, or names with commas; a name that exists is one."""
    value = value.strip()
    if pathlib.Path(value).exists():
        return (value,)
    try:
        read = ast.literal_eval(value)
        if isinstance(read, tuple | list) and all(isinstance(x, str) for x in read):
            return tuple(read)
    except (SyntaxError, ValueError):
        pass
    if (value[0], value[-1]) in (("(", ")"), ("[", "]")):
        value = value[1:-1].strip().removesuffix(",")
    items = []
    end = 0
    while end < len(value) and (match := _ITEM.match(value, end)):
        items.append(next(text for text in match.groups() if text is not None))
        end = match.end()
    return tuple(items)
