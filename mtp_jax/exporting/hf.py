"""A folder for everybody: a plain Llama, and beside it heads that draft.

Axes: T positions, D model width, V vocabulary.
"""

import json
import pathlib
from importlib import resources
from typing import Any

import numpy as np

from mtp_jax.exporting import reference, tensors
from mtp_jax.exporting.card import model_card
from mtp_jax.exporting.check import (
    check_as_import,
    checked_ids,
    compare_logits,
    expected_logits,
)
from mtp_jax.exporting.parts import Arrays, Parts
from mtp_jax.exporting.tokenizer_files import write_tokenizer
from mtp_jax.storage import write_json

_CODE = "modeling_mtp_heads.py"
_CLASS = "MTPLlamaForCausalLM"


def write_hf(
    parts: Parts,
    folder: pathlib.Path,
    *,
    positions: int,
    shard_bytes: int,
    figures: dict[str, Any] | None,
) -> None:
    """Writes the folder, reads it again and compares it with the model.

    Raises:
      UserError: the tokenizer cannot be written for Hugging Face's libraries.
      RunFailed: what was read is not what was to be written.
    """
    about = parts.config(positions)
    tensors.write(folder, parts.llama, shard_bytes)
    if parts.heads:
        about["auto_map"] = {
            "AutoModelForCausalLM": f"{_CODE.removesuffix('.py')}.{_CLASS}"
        }
        about["mtp_heads"] = parts.about_heads()
        (folder / "mtp_heads").mkdir()
        tensors.write(folder / "mtp_heads", parts.heads, 1 << 62)
        code = resources.files("mtp_jax.exporting").joinpath(_CODE).read_text("utf-8")
        (folder / _CODE).write_text(code, encoding="utf-8")
    write_json(folder / "config.json", about)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: about[name] for name in ids} | {"do_sample": False}
    ends = getattr(parts.model.tokenizer, "end_ids", ())
    if len(ends) > 1:
        generation["eos_token_id"] = list(ends)
    write_tokenizer(folder, parts.model.tokenizer, positions)
    write_json(folder / "generation_config.json", generation)
    (folder / "README.md").write_text(model_card(parts, figures), encoding="utf-8")
    check_hf(parts, folder)


def check_hf(parts: Parts, folder: pathlib.Path) -> None:
    """Compares a folder with the model: tensors to the bit, logits by NumPy.

    Raises:
      RunFailed: they differ.
    """
    llama = tensors.read(folder)
    tensors.compare(folder, parts.llama, llama)
    heads: Arrays = {}
    if parts.heads:
        heads = tensors.read(folder / "mtp_heads")
        tensors.compare(folder / "mtp_heads", parts.heads, heads)
    check_as_import(parts, folder)
    if not parts.heads:
        return
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = all_logits(checked_ids(parts), llama, heads, about)
    expected_NTV = expected_logits(parts)
    for number, logits_TV in enumerate(found):
        compare_logits(parts, folder, number, logits_TV, expected_NTV[number])


def all_logits(
    ids_T: np.ndarray, llama: Arrays, heads: Arrays, about: dict[str, Any]
) -> list[np.ndarray]:
    """Logits of head 1 and of each exported head, float64 [T, V], in NumPy.

    Args:
      ids_T: one text.
      llama, heads: tensors of the folder, by name.
      about: the content of config.json.
    """
    wide = {name: x.astype(np.float64) for name, x in (llama | heads).items()}
    streams = reference.streams(ids_T, wide, about)
    eps, scale_D = about["rms_norm_eps"], wide["model.norm.weight"]
    table_VD = wide.get("lm_head.weight", wide["model.embed_tokens.weight"])
    found = [reference.norm(streams[-1], scale_D, eps) @ table_VD.T]
    of = about.get("mtp_heads", {})
    kind = of.get("kind")
    trunk_TD = streams[-1]
    if kind in ("parallel", "causal"):
        trunk_TD = streams[about["num_hidden_layers"] - of["layers"]]
    stream_TD = streams[-1]
    for number in range(of.get("n_future_tokens", 1) - 1):
        prefix = f"heads.{number}."
        own_D = wide.get(f"{prefix}norm.weight", scale_D)
        if kind == "residual":
            hidden_TD = reference.norm(trunk_TD, own_D, eps)
            for i in range(of["layers"]):
                w, b = (wide[f"{prefix}blocks.{i}.{x}"] for x in ("weight", "bias"))
                hidden_TD = hidden_TD + reference.silu(hidden_TD @ w.T + b)
        elif kind == "linear":
            stream_TD = trunk_TD @ wide[f"{prefix}map.weight"].T
        else:
            stream_TD = trunk_TD if kind == "parallel" else stream_TD
            for i in range(of["layers"]):
                name = f"{prefix}layers.{i}."
                stream_TD = reference.layer(stream_TD, wide, name, about)
        if kind != "residual":
            hidden_TD = reference.norm(stream_TD, own_D, eps)
        logits_TV = hidden_TD @ wide.get(f"{prefix}unembedding.weight", table_VD).T
        if "markov_in.weight" in wide:
            before_T = np.append(ids_T[number + 1 :], np.zeros(number + 1, int))
            logits_TV += (
                wide["markov_in.weight"][before_T] @ wide["markov_out.weight"].T
            )
        found.append(logits_TV)
    return found
