"""Heads beside a model, as an exported folder of Hugging Face has them.

The model is trunk and head 1. Heads 2 to n are in `mtp_heads/model.safetensors`, and
`mtp_heads` in config.json says what they are; `exporting/modeling_mtp_heads.py` runs
them in transformers, whose modules give the tensors their names.
"""

import dataclasses
from typing import Any

from mtp_jax.config import HeadsConfig, ModelConfig
from mtp_jax.config.regrow import regrown_config
from mtp_jax.errors import UserError
from mtp_jax.interop.places import HeadNames

FIELD = FOLDER = "mtp_heads"
# Beside which such heads are: those with a class in that file.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2")
NAMES = HeadNames(
    layers="heads.{}.layers.{}.",
    kinds=("parallel", "causal", "linear", "residual"),
    norm="heads.{}.norm.weight",
    unembedding="heads.{}.unembedding.weight",
    map="heads.{}.map.weight",
    blocks="heads.{}.blocks.{}.",
    markov=("markov_in.weight", "markov_out.weight"),
)
_COUNT = "n_future_tokens"
_OPTIONS = ("kind", "layers", "norm", "unembedding", "markov_rank")
_VALUES = {
    "kind": NAMES.kinds,
    "norm": ("shared", "own"),
    "unembedding": ("shared", "own"),
}


def to_mtp_heads(model: ModelConfig) -> dict[str, Any]:
    """The entry of config.json about the heads of a model."""
    options = {name: getattr(model.heads, name) for name in _OPTIONS}
    return {_COUNT: model.n_future_tokens, **options}


def from_mtp_heads(
    plain: ModelConfig, tied: bool | None, about: Any, where: str
) -> ModelConfig:
    """The model with its heads.

    Args:
      plain: of one head.
      tied: what the file says of its tables, None if nothing.
      about: the entry of config.json.
      where: the file, for errors.

    Raises:
      UserError: a field or a value that is not known, one that is missing, or heads
        that such a model does not have.
    """
    where = f"{where}: {FIELD}"
    names = {_COUNT, *_OPTIONS}
    if not isinstance(about, dict) or about.keys() != names:
        there = sorted(about) if isinstance(about, dict) else about
        raise UserError(f"{where} has {there}; it must have {sorted(names)}.")
    for name, value in about.items():
        known = _VALUES.get(name)
        if known is not None and value not in known:
            raise UserError(
                f"{where}.{name} is {value!r}; it must be one of {', '.join(known)}."
            )
        if known is None and type(value) is not int:
            raise UserError(f"{where}.{name} is {value!r}; it must be a whole number.")
    n = about[_COUNT]
    if n < 2:
        raise UserError(f"{where}.{_COUNT} is {n}; with heads it is at least 2.")
    if tied and about["unembedding"] == "own":
        raise UserError(
            f"{where}.unembedding is own, and tie_word_embeddings is true; heads with "
            "tables of their own are beside untied ones."
        )
    try:
        heads = HeadsConfig(**{name: about[name] for name in _OPTIONS})
        return regrown_config(dataclasses.replace(plain), n, heads)
    except UserError as error:
        raise UserError(f"{where} cannot be: {error}") from None
