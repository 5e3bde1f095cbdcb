"""Meta's checkpoints with several heads: `consolidated.pth` and `params.json`.

arXiv:2404.19737's released models: `layers` are the trunk and, as their last, head 1;
`extra_heads` are the others; one `norm` and one `output` serve all. Queries and keys
turn in pairs (2j, 2j + 1). `n_layers` counts the heads, as ours does.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtp_jax.config import ModelConfig, RopeConfig
from mtp_jax.errors import UserError
from mtp_jax.interop.fields import real, told_with, whole
from mtp_jax.interop.places import HeadNames, Names
from mtp_jax.interop.sources import Arrays

NAMES = Names(
    embedding="tok_embeddings.weight",
    norm="norm.weight",
    unembedding="output.weight",
    layers="layers.{}.",
    heads=HeadNames("extra_heads.{}."),
    layer={
        "norm_attention": "attention_norm.weight",
        "w_q": "attention.wq.weight",
        "w_k": "attention.wk.weight",
        "w_v": "attention.wv.weight",
        "w_o": "attention.wo.weight",
        "norm_mlp": "ffn_norm.weight",
        "mlp/w_gate": "feed_forward.w1.weight",
        "mlp/w_up": "feed_forward.w3.weight",
        "mlp/w_down": "feed_forward.w2.weight",
    },
    interleaved=True,
)
_CONTEXT = 4096  # the files do not say it
_KNOWN = frozenset(
    [
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "ffn_dim_multiplier",
        "norm_eps",
        "rope_theta",
        "n_future_tokens",
        "max_batch_size",
        "max_seq_len",
    ]
)


def from_meta(params: Mapping[str, Any], where: str) -> ModelConfig:
    """The model of a `params.json`, untied.

    Raises:
      UserError: a field that is not known, is missing or of another type.
    """
    if unknown := sorted(
        k for k, v in params.items() if k not in _KNOWN and v not in (None, False)
    ):
        raise UserError(f"{where}: {unknown[0]} is a field that is not known here.")

    def number(name: str, usual: int | None = None) -> int:
        return whole(params, name, where, usual)

    d, heads = number("dim"), number("n_heads")
    d_ff = int(real(params, "ffn_dim_multiplier", where, 1.0) * int(8 * d / 3))
    multiple = number("multiple_of", 256)
    context = number("max_seq_len", _CONTEXT)
    with told_with(where):
        return ModelConfig(
            vocab_size=number("vocab_size"),
            d_model=d,
            num_layers=number("n_layers"),
            n_future_tokens=number("n_future_tokens", 1),
            num_query_heads=heads,
            num_kv_heads=number("n_kv_heads", heads),
            d_head=d // heads,
            d_ff=-(-d_ff // multiple) * multiple,
            norm_eps=real(params, "norm_eps", where, 1e-5),
            rope_theta=real(params, "rope_theta", where, 10_000.0),
            rope=RopeConfig(context=context),
        )


def to_meta(model: ModelConfig, context: int) -> dict[str, Any]:
    """The `params.json` of a model.

    Raises:
      UserError: its layers are not Llama's.
    """
    found = {
        "dim": model.d_model,
        "n_layers": model.num_layers,
        "n_heads": model.num_query_heads,
        "n_kv_heads": model.num_kv_heads,
        "vocab_size": model.vocab_size,
        # Of any width: with it the formula gives what is a multiple of itself.
        "multiple_of": model.d_ff,
        "ffn_dim_multiplier": model.d_ff / int(8 * model.d_model / 3) / 2,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "n_future_tokens": model.n_future_tokens,
        "max_seq_len": context,
    }
    again = from_meta(found, "the params.json that was made")
    of = "d_head", "d_ff", "layer", "num_layers"
    wrong = [name for name in of if getattr(again, name) != getattr(model, name)]
    if wrong or model.rope.scaling != "none" or model.tie_embeddings:
        raise UserError(
            "Meta's format holds untied models with Llama's layers, whose heads of "
            "attention share d_model and whose positions are not stretched."
        )
    return found


def meta_source(folder: pathlib.Path) -> Arrays:
    """The tensors of a folder's `consolidated.pth`.

    Only arrays are read of the file: a pickle that would run code is refused.

    Raises:
      UserError: no such file, one that is damaged or unsafe, or torch is not installed.
    """
    files = sorted(folder.glob("consolidated*.pth"))
    if len(files) != 1:
        raise UserError(
            f"{folder} has {len(files)} files consolidated*.pth, and one is read; "
            "join those of model-parallel parts first."
        )
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{files[0]} is read with torch, which is not installed: pip install torch."
        ) from None
    try:
        found = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
        found = found.get("model", found)
        tensors = {k: v for k, v in found.items() if not k.endswith("freqs_cis")}
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    except Exception as error:  # of unpickling, any
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{files[0]} is not a file of weights alone: {first[:160]}"
        ) from None

    def make(name: str) -> np.ndarray:
        return np.asarray(tensors[name].float().numpy())

    return Arrays(str(folder), files, shapes, make)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it cannot be read, or is no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object.")
    return found
