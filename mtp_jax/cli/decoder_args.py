"""Decoders and their options as command lines give them."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from mtp_jax.cli.args import Parser
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.decode.fitting import is_required, options_of
from mtp_jax.errors import UserError


def decoder_of(spec: str, options: Sequence[str] = ()) -> Decoder:
    """The decoder of `NAME` or `NAME:option=value,option=value`.

    Args:
      spec: its name, and options if there are any.
      options: more options, from the command line: `--option=value`.

    Raises:
      UserError: no such decoder, an option that it does not have, a bad value.
    """
    name, _, rest = spec.partition(":")
    if name not in DECODERS:
        known = ", ".join(DECODERS)
        raise UserError(f"--decoder={name} is unknown; give one of {known}.")
    kind = DECODERS[name]
    parser = Parser(f"--decoder={name}", "", help_at="mtp-jax generate --decoders")
    for field in options_of(kind):
        parser.add_argument(f"--{field.name}", **_argument(kind, field))
    of_spec = [f"--{option}" for option in rest.split(",") if option]
    values, unknown = parser.parse_known_args([*of_spec, *options])
    if unknown:
        own = [f"--{field.name}" for field in options_of(kind)]
        raise UserError(
            f"unknown option {unknown[0]}; the options of --decoder={name} are "
            f"{', '.join(own) or 'none'}, and those of --help."
        )
    return kind(**vars(values))


def description() -> str:
    """A listing of every decoder, what it does and its options, for people."""
    lines = []
    for name, kind in DECODERS.items():
        says = (kind.__doc__ or "").strip().splitlines()[0]
        lines.append(f"{name}: {says}{' (lossy)' if kind.lossy else ''}")
        for field in options_of(kind):
            has_one = not is_required(field) and _default(field) != ""
            default = f" ({str(_default(field)).lower()})" if has_one else ""
            lines.append(f"  --{field.name}  {field.metadata.get('help', '')}{default}")
    return "\n".join(lines)


def _argument(kind: type, field: dataclasses.Field) -> dict[str, Any]:
    hint = typing.get_type_hints(kind)[field.name]
    required = is_required(field)
    return {
        "type": _converter(hint),
        "required": required,
        "metavar": field.name[:1].upper(),
        "default": None if required else _default(field),
    }


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return typing.cast(Any, field.default_factory)()


def _converter(hint: Any) -> Any:
    """The function from an option's text to a value of a field's type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        [hint] = [x for x in typing.get_args(hint) if x is not types.NoneType]
    if hint is bool:
        return _truth
    if typing.get_origin(hint) is tuple:
        of = _converter(typing.get_args(hint)[0])

        def values(text: str) -> tuple[Any, ...]:
            return tuple(of(part) for part in text.split(","))

        values.__name__ = f"{getattr(of, '__name__', 'value')} list"
        return values
    return hint


def _truth(text: str) -> bool:
    if (word := text.lower()) not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return word == "true"
