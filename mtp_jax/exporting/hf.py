"""A folder for everybody: a plain model, and beside it heads that draft."""

import pathlib
from importlib import resources
from typing import Any

from mtp_jax.exporting import tensors
from mtp_jax.exporting.card import model_card
from mtp_jax.exporting.check import check_as_import
from mtp_jax.exporting.parts import Parts
from mtp_jax.exporting.tokenizer_files import write_tokenizer
from mtp_jax.interop import mtp_heads
from mtp_jax.storage import write_json

_CODE = "modeling_mtp_heads.py"


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
        drafting = f"{_CODE.removesuffix('.py')}.MTP{about['architectures'][0]}"
        about["auto_map"] = {"AutoModelForCausalLM": drafting}
        about[mtp_heads.FIELD] = mtp_heads.to_mtp_heads(parts.cfg)
        (folder / mtp_heads.FOLDER).mkdir()
        tensors.write(folder / mtp_heads.FOLDER, parts.heads, 1 << 62)
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
    tensors.compare(folder, parts.llama, tensors.read(folder))
    if parts.heads:
        beside = folder / mtp_heads.FOLDER
        tensors.compare(beside, parts.heads, tensors.read(beside))
    check_as_import(parts, folder)
