"""Fast-LLM's `mtp_llama`: all heads as layers of one model, with a norm a head.

Names and shapes: ServiceNow/Fast-LLM, fast_llm_external_models/mtp_llama. Layers
`model.layers.*` end with head 1, `model.mtp_heads.*` are the heads after it, and
`model.mtp_norms.*` the last norm of every head.
"""

import pathlib

import numpy as np

from mtp_jax.config import LayerConfig
from mtp_jax.errors import UserError
from mtp_jax.exporting import tensors
from mtp_jax.exporting.check import check_as_import
from mtp_jax.exporting.parts import Parts
from mtp_jax.exporting.tokenizer_files import write_tokenizer
from mtp_jax.storage import write_json


def write_fast_llm(parts: Parts, folder: pathlib.Path, positions: int) -> list[str]:
    """Writes the folder and reads it again; nothing of such a model is lost.

    Raises:
      UserError: heads that the format does not know.
      RunFailed: what was read is not what was to be written.
    """
    require_plain_heads(parts, "fastllm")
    arrays = dict(parts.llama)
    scale_D = arrays.pop("model.norm.weight")
    for name, x in parts.heads.items():
        _, number, rest = name.split(".", 2)
        if rest.startswith("layers.0."):
            arrays[f"model.mtp_heads.{number}.{rest.removeprefix('layers.0.')}"] = x
    for i in range(parts.cfg.n_future_tokens):
        own_D = parts.heads.get(f"heads.{i - 1}.norm.weight", scale_D)
        arrays[f"model.mtp_norms.{i}.weight"] = np.array(own_D)
    tensors.write(folder, arrays, 1 << 62)
    about = parts.config(positions) | {
        "architectures": ["MTPLlamaForCausalLM"],
        "model_type": "mtp_llama",
        "prediction_heads": parts.cfg.n_future_tokens,
    }
    write_json(folder / "config.json", about)
    write_tokenizer(folder, parts.model.tokenizer, positions)
    tensors.compare(folder, arrays, tensors.read(folder))
    check_as_import(parts, folder)
    return []


def require_plain_heads(parts: Parts, name: str) -> None:
    """Refuses heads that are not one layer each, with the one table of all.

    Raises:
      UserError: naming the field.
    """
    heads = parts.cfg.heads
    several = parts.cfg.n_future_tokens > 1
    for field, value, plain in (
        ("kind", heads.kind, "parallel"),
        ("layers", heads.layers, 1),
        ("unembedding", heads.unembedding, "shared"),
        ("markov_rank", heads.markov_rank, 0),
    ):
        if several and value != plain:
            raise UserError(
                f"--format={name} holds parallel heads of one layer, and "
                f"config.heads.{field} is {value}; grow --heads=1 first, or choose hf."
            )


def require_plain_layers(parts: Parts, name: str) -> None:
    """Refuses layers and positions that differ from the first Llama's.

    Raises:
      UserError: naming the section.
    """
    cfg = parts.plain
    if cfg.layer != LayerConfig() or cfg.rope.scaling != "none":
        raise UserError(
            f"--format={name} holds layers and positions of the first Llamas, and "
            "config.layer or config.rope has others; choose hf."
        )
    if name == "meta" and cfg.num_query_heads * cfg.d_head != cfg.d_model:
        raise UserError(
            f"--format=meta has no head size of its own, and {cfg.num_query_heads} "
            f"heads of {cfg.d_head} are not the width, {cfg.d_model}; choose hf."
        )
