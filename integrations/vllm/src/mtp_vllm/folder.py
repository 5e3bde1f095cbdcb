"""What an exported folder must be to draft in vLLM, and how vLLM is told of it.

`mtp_heads` in config.json says what the heads are:
  n_future_tokens: n; the Llama is head 1, and heads 2 to n are beside it.
  kind: parallel, layers over the trunk's output (arXiv:2404.19737, section 2); causal,
    layers over the head before; linear, a matrix; residual, blocks over the normed
    output (arXiv:2401.10774, section 2.1).
  layers: layers or blocks of a head, and with layers those of head 1, too.
  norm, unembedding: shared, those of the Llama, or own.
  markov_rank: rank of a bias by the token before, 0 for none.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

ARCHITECTURE = "LlamaWithHeadsForCausalLM"
PROPOSER = "mtp_vllm.proposer.HeadsProposer"
KINDS = ("parallel", "causal", "linear", "residual")
WEIGHTS = pathlib.PurePath("mtp_heads", "model.safetensors")
_FIELD = "mtp_heads"
_CHOICES = {"kind": KINDS, "norm": ("shared", "own"), "unembedding": ("shared", "own")}


class Refused(ValueError):
    """A folder or a setting that cannot be served; the message is one line."""


@dataclasses.dataclass(frozen=True)
class HeadsAbout:
    """The heads beside a Llama; the module's docstring explains the fields."""

    n_future_tokens: int
    kind: str
    layers: int
    norm: str
    unembedding: str
    markov_rank: int

    @property
    def has_layers(self) -> bool:
        """True if heads are decoder layers, with keys and values of their own."""
        return self.kind in ("parallel", "causal")


def read_heads(config: Mapping[str, Any], where: str) -> HeadsAbout:
    """The heads of a model, by the content of its config.json.

    Args:
      config: the content, or the fields of transformers' config object.
      where: the file or folder, for messages.

    Raises:
      Refused: no heads, a Llama of another family, or heads that are not known.
    """
    family, about = config.get("model_type"), config.get(_FIELD)
    if about is None:
        raise Refused(
            f"{where} has no {_FIELD} to draft with; export a model of several heads "
            "with `python -m mtp_jax export --format=hf`, or serve it without mtp_vllm."
        )
    if family != "llama":
        raise Refused(f"{where} has model_type {family!r}; heads are beside a llama.")
    known = {field.name for field in dataclasses.fields(HeadsAbout)}
    if not isinstance(about, Mapping) or about.keys() != known:
        there = sorted(about) if isinstance(about, Mapping) else about
        raise Refused(
            f"{where} has {_FIELD} of {there}; this version knows {sorted(known)}."
        )
    for name, value in about.items():
        choices = _CHOICES.get(name)
        if choices is not None and value not in choices:
            raise Refused(
                f"{where} has {_FIELD}.{name} {value!r}; "
                f"this version serves {', '.join(choices)}."
            )
        if choices is None and type(value) is not int:
            raise Refused(f"{where} has {_FIELD}.{name} {value!r}, not a whole number.")
    heads = HeadsAbout(**about)
    if heads.n_future_tokens < 2:
        raise Refused(f"{where} has {_FIELD}.n_future_tokens below 2: nothing drafts.")
    if heads.has_layers and not 1 <= heads.layers <= config["num_hidden_layers"]:
        raise Refused(
            f"{where} has {_FIELD}.layers {heads.layers}; with its "
            f"{config['num_hidden_layers']} layers it must be between 1 and those."
        )
    return heads


def check_drafts(drafts: int, heads: HeadsAbout, where: str) -> None:
    """Checks a number of drafts a step.

    Raises:
      Refused: less than one, or more than there are heads for.
    """
    most = heads.n_future_tokens - 1
    if not 1 <= drafts <= most:
        raise Refused(
            f"{drafts} drafts a step are not between 1 and {most}, "
            f"the heads after the first that {where} has."
        )


def arguments(
    folder: str | os.PathLike[str], drafts: int | None = None
) -> dict[str, Any]:
    """What vLLM must be told to draft with the heads of a folder.

    `LLM(**arguments(folder))` and `EngineArgs(**arguments(folder))` take them; other
    arguments of vLLM go beside.

    Args:
      folder: an exported folder, of `python -m mtp_jax export --format=hf`.
      drafts: tokens to draft a step, at most the heads after the first; None: all.

    Returns:
      model, hf_overrides and speculative_config.

    Raises:
      Refused: the folder is not there, its heads cannot be served, or drafts is out of
        range.
    """
    path = pathlib.Path(folder)
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{file} cannot be read: {error}.") from None
    if not isinstance(config, dict):
        raise Refused(f"{file} is not a config of a model.")
    heads = read_heads(config, str(file))
    if not (path / WEIGHTS).is_file():
        raise Refused(f"{path / WEIGHTS} is missing: the heads' weights; export again.")
    count = heads.n_future_tokens - 1 if drafts is None else drafts
    check_drafts(count, heads, str(path))
    return {
        "model": str(path),
        "hf_overrides": {"architectures": [ARCHITECTURE]},
        "speculative_config": {
            "method": "custom_class",
            "model": PROPOSER,
            "num_speculative_tokens": count,
        },
    }
