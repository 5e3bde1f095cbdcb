"""A model of other people, of whatever format: its config, its tensors, where they go.

The format is told by the files of a folder, or by the end of a file's name.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.interop import (
    fast_llm,
    gguf_file,
    gguf_tokenizer,
    hf_config,
    hf_names,
    llama2c,
    llama2c_tokenizer,
    meta,
    mtp_heads,
)
from mtp_jax.interop.places import Names
from mtp_jax.interop.sources import Joined, Shards, Source

# Tensors that follow from the config; older programs wrote them.
_FOLLOWING = "self_attn.rotary_emb.inv_freq"
_ROWS = 4096  # that are compared at once


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A model of another format, opened; nothing of its weights is read yet."""

    format: str  # "hf", "fastllm", "meta", "llama2c" or "gguf"
    family: str  # a key of `hf_config.FAMILIES`
    model: ModelConfig  # its ties decided
    names: Names
    source: Source
    ignored: dict[str, str]  # tensors that are not needed, and why
    # Makes the files of its tokenizer, by name, where the format carries one.
    tokenizer: Callable[[], Mapping[str, bytes]] | None = None

    @property
    def needed(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are read."""
        there = self.source.shapes.items()
        return {name: shape for name, shape in there if name not in self.ignored}


def open_foreign(path: pathlib.Path) -> Foreign:
    """Opens a folder or a file.

    Raises:
      UserError: no format that is known, or what is there contradicts itself.
    """
    if not path.exists():
        raise UserError(f"--from={path}: there is no such folder or file.")
    if path.is_dir():
        if (path / "config.json").exists():
            return _of_hugging_face(path)
        if (path / "params.json").exists():
            return _of_meta(path)
        found = sorted(
            p
            for p in path.iterdir()
            if p.suffix in (".gguf", ".bin") and not llama2c_tokenizer.is_tokenizer(p)
        )
        if not found:
            raise UserError(
                f"--from={path} has no config.json (Hugging Face, Fast-LLM), no "
                "params.json (Meta) and no file .gguf or .bin."
            )
        if len(found) > 1:
            raise UserError(
                f"--from={path} has several models; name one of them: "
                f"{', '.join(p.name for p in found)}."
            )
        path = found[0]
    if path.suffix == ".gguf":
        model, arch, source, fields = gguf_file.read_gguf(path)
        names = gguf_file.gguf_names(arch)
        foreign = _decided("gguf", arch, model, names, source, None)
        make = functools.partial(
            gguf_tokenizer.gguf_tokenizer, fields, str(path), model.rope.context
        )
        return dataclasses.replace(foreign, tokenizer=make)
    if path.suffix == ".bin":
        model, tied, source = llama2c.read_llama2c(path)
        foreign = _decided("llama2c", "llama", model, llama2c.NAMES, source, tied)
        beside = llama2c_tokenizer.tokenizer_beside(path)
        if beside is None:
            return foreign
        make = functools.partial(llama2c_tokenizer.llama2c_tokenizer, beside)
        return dataclasses.replace(foreign, tokenizer=make)
    raise UserError(
        f"--from={path} is no folder and ends in none of .gguf (llama.cpp), .bin "
        "(llama2.c)."
    )


def _of_hugging_face(folder: pathlib.Path) -> Foreign:
    file = folder / "config.json"
    config = meta.read_json(file)
    if config.get("model_type") == fast_llm.MODEL_TYPE:
        model, tied = fast_llm.from_fast_llm(config, str(file))
        return _decided("fastllm", "llama", model, fast_llm.NAMES, Shards(folder), tied)
    more = frozenset({mtp_heads.FIELD})
    model, tied = hf_config.from_hf(config, str(file), more)
    family: str = config["model_type"]
    about, beside = config.get(mtp_heads.FIELD), folder / mtp_heads.FOLDER
    if about is None and not beside.exists():
        names = hf_names.hf_names(family)
        return _decided("hf", family, model, names, Shards(folder), tied)
    if about is None or not beside.is_dir() or family not in mtp_heads.FAMILIES:
        raise UserError(
            f"{file} is of a {family} and has "
            f"{'no' if about is None else 'an'} entry {mtp_heads.FIELD}, and a folder "
            f"of that name is {'' if beside.is_dir() else 'not '}beside it; heads are "
            f"read where both are there, of {', '.join(mtp_heads.FAMILIES)}."
        )
    model = mtp_heads.from_mtp_heads(model, tied, about, str(file))
    names = hf_names.hf_names(family, mtp_heads.NAMES)
    source = Joined(str(folder), [Shards(folder), Shards(beside)])
    return _decided("hf", family, model, names, source, tied)


def _of_meta(folder: pathlib.Path) -> Foreign:
    file = folder / "params.json"
    found: dict[str, Any] = meta.read_json(file)
    model = meta.from_meta(found, str(file))
    source = meta.meta_source(folder)
    return _decided("meta", "llama", model, meta.NAMES, source, None)


def _decided(
    form: str,
    family: str,
    model: ModelConfig,
    names: Names,
    source: Source,
    said: bool | None,
) -> Foreign:
    """The opened model, with ties as the tensors have them.

    Raises:
      UserError: the config says something else, or has more layers than tensors.
    """
    ignored = {
        name: "follows from the config" for name in source.shapes
        if name.endswith(_FOLLOWING)
    }  # fmt: skip
    if model.num_layers > len(source.shapes):  # and a list of all would be long
        raise UserError(
            f"{source.where} has {len(source.shapes)} tensors, and its config speaks "
            f"of {model.num_layers} layers."
        )
    has = names.unembedding in source.shapes
    if model.heads.unembedding == "own":
        said = False  # whatever head 1's table is equal to
    tied = not has or (said is not False and _equal(source, names))
    if not has and said is False:
        raise UserError(
            f"{source.where} says that its tables are not tied, and lacks "
            f"{names.unembedding}."
        )
    if said and not tied:
        raise UserError(
            f"{source.where} says that its tables are tied, and {names.unembedding} is "
            f"not {names.embedding}."
        )
    if has and tied:
        ignored[names.unembedding] = f"equals {names.embedding}"
    model = dataclasses.replace(model, tie_embeddings=tied)
    return Foreign(form, family, model, names, source, ignored)


def _equal(source: Source, names: Names) -> bool:
    """True if both tables are there and the same, value for value."""
    one, other = names.embedding, names.unembedding
    shape = source.shapes.get(one)
    if shape is None or shape != source.shapes[other]:
        return False
    for first in range(0, shape[0], _ROWS):
        rows = slice(first, min(first + _ROWS, shape[0]))
        if not np.array_equal(source.read(one, rows), source.read(other, rows)):
            return False
    return True
