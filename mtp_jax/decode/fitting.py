"""Which decoders a model can run, and which of their fields are options."""

import dataclasses
import typing
from typing import Any

from mtp_jax.config import ModelConfig
from mtp_jax.decode.decoders import DECODERS
from mtp_jax.decode.decoders.state import Decoder
from mtp_jax.errors import UserError


def fitting(cfg: ModelConfig, heads: int | None = None) -> dict[str, Decoder | str]:
    """Every decoder by name with its default options, or why it cannot run.

    Args:
      cfg: of the model.
      heads: so many of its heads are used; None: all.

    Returns:
      A decoder, or one line of text, for each name in `DECODERS`.
    """
    heads = cfg.n_future_tokens if heads is None else heads
    fit: dict[str, Decoder | str] = {}
    for name, kind in DECODERS.items():
        missing = [field.name for field in options_of(kind) if is_required(field)]
        if missing:
            fit[name] = f"its option {missing[0]} is required"
            continue
        try:
            decoder = kind()
        except UserError as error:
            fit[name] = str(error)
            continue
        fit[name] = why_not(decoder, cfg, heads) or decoder
    return fit


def why_not(decoder: Decoder, cfg: ModelConfig, heads: int) -> str:
    """The reason why a decoder cannot run with so many heads; empty if it can."""
    if heads == 1 and needs_heads(decoder):
        return "there are no heads to draft with"
    if getattr(decoder, "at_once", False) and cfg.heads.wait_for_tokens(heads):
        why = "a Markov bias" if cfg.heads.markov_rank else "serial heads"
        return (
            f"it asks all heads at once, and those of this model ({why}) wait for the "
            "token before their own; blockwise, speculative, tree, typical, "
            "dynamo_exact, and beam without lookahead draft one after another"
        )
    return ""


def default_decoder(heads: int) -> str:
    """The name of the decoder for a model of so many heads, if none is asked for."""
    return "plain" if heads == 1 else "blockwise"


def needs_heads(decoder: Decoder) -> bool:
    """Returns True if a decoder has no use for a model of one head."""
    return decoder.heads(2) > 1


def options_of(kind: Any) -> list[dataclasses.Field]:
    """Fields of a decoder that are given; it makes the others itself of these."""
    return [f for f in dataclasses.fields(typing.cast(Any, kind)) if f.init]


def is_required(option: dataclasses.Field) -> bool:
    """Returns True if an option has no default."""
    missing = dataclasses.MISSING
    return option.default is missing and option.default_factory is missing


def settings_of(decoder: Decoder) -> dict[str, Any]:
    """The name and the options of a decoder, in JSON's types."""
    name = type(decoder).__name__.lower()
    return {
        "name": name,
        **{f.name: getattr(decoder, f.name) for f in options_of(decoder)},
    }
