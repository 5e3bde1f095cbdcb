"""Rotary positions in Hugging Face's configs, of today and of before."""

import math
from collections.abc import Mapping
from typing import Any

from mtp_jax.config import ModelConfig, RopeConfig
from mtp_jax.errors import UserError
from mtp_jax.interop.fields import fields_in, real, told_with, truth, whole


def rope_from_hf(
    config: Mapping[str, Any], theta: float, context: int, where: str
) -> tuple[float, RopeConfig]:
    """The base of rotary positions of a `config.json`, and how they are stretched.

    Args:
      config: its content; fields of several names must agree.
      theta: the base where it has none.
      context: positions of the longest text.
      where: the file, for errors.

    Raises:
      UserError: a kind or a field of it that is not known, or one that is missing.
    """
    kind, theta, found = _said(config, theta, where)
    known: dict[str, set[str]] = {
        "default": {"factor", "original_max_position_embeddings"},
        "linear": {"factor", "original_max_position_embeddings"},
        "llama3": {
            "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings",
        },
        "yarn": {
            "factor", "original_max_position_embeddings", "attention_factor",
            "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
        },
    }  # fmt: skip
    if kind not in known:
        raise UserError(
            f"{where}: rope_type is {kind!r}; known are {', '.join(known)}."
        )
    if surplus := sorted(found.keys() - known[kind]):
        raise UserError(f"{where}: {surplus[0]} of rope_type {kind} is not known.")
    if kind == "default":
        return theta, RopeConfig(context=context)
    values: dict[str, Any] = {
        name: real(found, name, where)
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        if name in found or (kind == "llama3" and name.endswith("freq_factor"))
    }
    factor = real(found, "factor", where)
    if kind != "linear":
        original = whole(found, "original_max_position_embeddings", where, context)
        values |= {"original_context": original}
    if kind == "yarn":
        values |= {
            "truncate": truth(found, "truncate", where, True),
            "attention_factor": _attention_factor(found, where),
        }
    with told_with(where):
        rope = RopeConfig(
            scaling=kind,  # type: ignore[arg-type]
            factor=factor,
            context=context,
            **values,
        )
    return theta, rope


def _said(
    config: Mapping[str, Any], theta: float, where: str
) -> tuple[str, float, dict[str, Any]]:
    """The kind of positions of a `config.json`, their base, and their other fields.

    Programs differ in which of several names they believe: today's transformers takes
    `rope_scaling` before `rope_parameters`, and the one of before knows nothing else.

    Raises:
      UserError: the file says two things of one, or something that is not known.
    """
    told = [
        _of_one_name(config, name, where)
        for name in ("rope_parameters", "rope_scaling")
    ]
    thetas = [fields.pop("rope_theta", None) for fields in told]
    name = "original_max_position_embeddings"
    originals = {} if config.get(name) is None else {name: config[name]}
    newest, older = ({**originals, **x} if x else x for x in told)
    if newest and older and newest != older:
        raise UserError(
            f"{where}: rope_scaling and rope_parameters say different things of "
            "positions; keep the one that is meant."
        )
    found = newest or older or {"rope_type": "default", **originals}
    if originals and found.get(name) != originals[name]:
        raise UserError(f"{where}: {name} is there twice, and not alike.")
    bases = {
        real({"rope_theta": x}, "rope_theta", where)
        for x in (*thetas, config.get("rope_theta"))
        if x is not None
    }
    if len(bases) > 1:
        raise UserError(
            f"{where}: rope_theta is there several times, and not alike: "
            f"{', '.join(map(str, sorted(bases)))}."
        )
    if found.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not 1, which is not known.")
    kind = found.pop("rope_type")
    return kind, bases.pop() if bases else theta, found


def _of_one_name(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The fields under one name, with their kind as `rope_type`; none without it."""
    found = fields_in(config, name, where)
    kind = found.pop("type", "default")
    return {"rope_type": kind, **found} if found or kind != "default" else {}


def _attention_factor(found: Mapping[str, Any], where: str) -> float:
    """The factor of yarn on queries and keys; 0: by the usual formula."""
    if "attention_factor" in found:
        return real(found, "attention_factor", where)
    if not found.get("mscale") or not found.get("mscale_all_dim"):
        return 0.0
    scale, of_all = (real(found, x, where) for x in ("mscale", "mscale_all_dim"))
    if found["factor"] <= 1:
        return 0.0
    log = 0.1 * math.log(found["factor"])
    return (scale * log + 1) / (of_all * log + 1)


def rope_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` of a model, under transformers' names."""
    rope = model.rope
    found: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
    if rope.scaling == "none":
        return found
    found |= {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear":
        found["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "llama3":
        found["low_freq_factor"] = rope.low_freq_factor
        found["high_freq_factor"] = rope.high_freq_factor
    if rope.scaling == "yarn":
        found["beta_fast"], found["beta_slow"] = rope.beta_fast, rope.beta_slow
        found["truncate"] = rope.truncate
        if rope.attention_factor:
            found["attention_factor"] = rope.attention_factor
    return found
