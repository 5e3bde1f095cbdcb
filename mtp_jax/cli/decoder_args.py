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
from mtp_jax.errors import UserError


def decoder_of(spec: str, options: Sequence[str] = ()) -> Decoder:
    """A decoder, `NAME` or `NAME:option=value,option=value`.

    Args:
      spec: which one.
      options: more of a command line, `--option=value`.

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


def fitting(heads: int) -> dict[str, Decoder | str]:
    """Every decoder with its own options, or why it cannot run with so many heads."""
    fit: dict[str, Decoder | str] = {}
    for name in DECODERS:
        try:
            decoder = decoder_of(name)
        except UserError as error:
            fit[name] = str(error)
            continue
        alone = heads == 1 and decoder.heads(2) > 1
        fit[name] = "there are no heads to draft with" if alone else decoder
    return fit


def description() -> str:
    """Every decoder, what it does and its options, for people."""
    lines = []
    for name, kind in DECODERS.items():
        says = (kind.__doc__ or "").strip().splitlines()[0]
        lines.append(f"{name}: {says}{' (lossy)' if kind.lossy else ''}")
        for field in options_of(kind):
            has_one = not _required(field) and _default(field) != ""
            default = f" ({str(_default(field)).lower()})" if has_one else ""
            lines.append(f"  --{field.name}  {field.metadata.get('help', '')}{default}")
    return "\n".join(lines)


def options_of(kind: Any) -> list[dataclasses.Field]:
    """Fields that are given; others a decoder makes itself of these."""
    return [f for f in dataclasses.fields(typing.cast(Any, kind)) if f.init]


def _argument(kind: type, field: dataclasses.Field) -> dict[str, Any]:
    hint = typing.get_type_hints(kind)[field.name]
    required = _required(field)
    return {
        "type": _converter(hint),
        "required": required,
        "metavar": field.name[:1].upper(),
        "default": None if required else _default(field),
    }


def _required(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return typing.cast(Any, field.default_factory)()


def _converter(hint: Any) -> Any:
    """From the text of an option to the type of a field."""
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
    if (said := text.lower()) not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return said == "true"
