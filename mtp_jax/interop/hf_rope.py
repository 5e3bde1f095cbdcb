"""Rotary positions in Hugging Face's configs, of today and of before."""

import math
from collections.abc import Mapping
from typing import Any

from mtp_jax.config import ModelConfig, RopeConfig
from mtp_jax.errors import UserError


def rope_from_hf(
    config: Mapping[str, Any], theta: float, context: int, where: str
) -> tuple[float, RopeConfig]:
    """The base of rotary positions of a `config.json`, and how they are stretched.

    Args:
      config: its content; of fields of several names the newest counts.
      theta: the base where it has none.
      context: positions of the longest text.
      where: the file, for errors.

    Raises:
      UserError: a kind or a field of it that is not known, or one that is missing.
    """
    found = dict(config.get("rope_scaling") or {}) | dict(
        config.get("rope_parameters") or {}
    )
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    theta = found.pop("rope_theta", None) or config.get("rope_theta") or theta
    usual = config.get("original_max_position_embeddings") or context
    if found.pop("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise UserError(f"{where}: partial_rotary_factor is not 1, which is not known.")
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
    found = {name: x for name, x in found.items() if x is not None}
    if surplus := sorted(found.keys() - known[kind]):
        raise UserError(f"{where}: {surplus[0]} of rope_type {kind} is not known.")
    if kind == "default":
        return float(theta), RopeConfig(context=context)
    if "factor" not in found:
        raise UserError(f"{where}: rope_type is {kind}, and its factor is missing.")
    values: dict[str, Any] = {
        name: float(found[name])
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        if name in found
    }
    if kind == "llama3" and {"low_freq_factor", "high_freq_factor"} - values.keys():
        raise UserError(f"{where}: llama3 needs low_freq_factor and high_freq_factor.")
    if kind != "linear":
        usual = found.get("original_max_position_embeddings", usual)
        values |= {"original_context": usual}
    if kind == "yarn":
        values |= {
            "truncate": found.get("truncate", True),
            "attention_factor": _attention_factor(found),
        }
    rope = RopeConfig(
        scaling=kind,  # type: ignore[arg-type]
        factor=float(found["factor"]),
        context=context,
        **values,
    )
    return float(theta), rope


def _attention_factor(found: Mapping[str, Any]) -> float:
    """What yarn multiplies queries and keys with; 0: by the usual formula."""
    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])
    scale, of_all = found.get("mscale"), found.get("mscale_all_dim")
    if not scale or not of_all or found["factor"] <= 1:
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
