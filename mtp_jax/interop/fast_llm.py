"""Fast-LLM's `mtp_llama`: Llama with parallel heads in a Hugging Face folder.

github.com/ServiceNow/Fast-LLM, fast_llm_external_models/mtp_llama: the last of
`model.layers` is head 1, `model.mtp_heads` are the others, and each head has a norm of
its own, `model.mtp_norms`; `prediction_heads` in the config counts all of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mtp_jax.config import HeadsConfig, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.interop.fields import whole
from mtp_jax.interop.hf_config import from_hf, to_hf
from mtp_jax.interop.hf_names import hf_names
from mtp_jax.interop.places import HeadNames, Names

MODEL_TYPE = "mtp_llama"
NAMES: Names = dataclasses.replace(
    hf_names("llama", HeadNames("model.mtp_heads.{}.")),
    norm="model.mtp_norms.{}.weight",
)


def from_fast_llm(
    config: Mapping[str, Any], where: str
) -> tuple[ModelConfig, bool | None]:
    """The model of a `config.json`, and what it says of ties, as `hf_config.from_hf`.

    Raises:
      UserError: as `from_hf`, or a number of heads that is none.
    """
    more = frozenset({"prediction_heads", "return_all_prediction_heads"})
    model, tied = from_hf(config, where, more, family="llama")
    n = whole(config, "prediction_heads", where, 1)
    heads = HeadsConfig(norm="own")
    layers = model.num_layers + n - 1
    return (
        dataclasses.replace(model, num_layers=layers, n_future_tokens=n, heads=heads),
        tied,
    )


def to_fast_llm(model: ModelConfig, context: int) -> dict[str, Any]:
    """The `config.json` of a model, whose heads have norms of their own.

    Raises:
      UserError: its layers are not Llama's, or it has one norm for all heads; repeated
        for each head it is the same model.
    """
    if model.heads != HeadsConfig(norm="own"):
        raise UserError(
            "mtp_llama has parallel heads of one layer, a norm each: repeat the norm, "
            "and set config.heads.norm=own."
        )
    shared = dataclasses.replace(model, heads=HeadsConfig())
    return {
        **to_hf(shared, context, family="llama"),
        "architectures": ["MTPLlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "prediction_heads": model.n_future_tokens,
    }
