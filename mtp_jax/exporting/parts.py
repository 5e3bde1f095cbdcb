"""A restored model as tensors by name: an ordinary model, and the heads beside it.

Names of the heads are those of modules in `modeling_mtp_heads.py`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import HeadsConfig, ModelConfig
from mtp_jax.config.regrow import regrown_config
from mtp_jax.interop import mtp_heads
from mtp_jax.interop.hf_config import family_of, to_hf
from mtp_jax.interop.hf_names import hf_names
from mtp_jax.interop.places import Place, places_of, to_file
from mtp_jax.model.language_model import model_builder
from mtp_jax.model.regrow import regrown

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model to be written."""

    model: Restored
    plain: ModelConfig  # one head, as deep as the way to head 1
    llama: Arrays  # by Hugging Face's names of the family; a tied output is left out
    heads: Arrays  # of heads 2 to n and of their bias; empty if there are none
    dropped: str  # why heads are not among them, or empty
    family: str  # of Hugging Face, a key of `hf_config.FAMILIES`

    @property
    def cfg(self) -> ModelConfig:
        return self.model.config.model

    def config(self, positions: int) -> dict[str, Any]:
        """The content of config.json, for texts of so many tokens."""
        tokenizer = self.model.tokenizer
        return to_hf(self.plain, positions, self.family) | {
            "initializer_range": 0.02,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.eos_id,
            "dtype": self.plain.param_dtype,
            "torch_dtype": self.plain.param_dtype,
        }


def parts_of(model: Restored) -> Parts:
    """The tensors of a restored model, on this host.

    Raises:
      UserError: a model whose layers no family has.
    """
    cfg = model.config.model
    # Heads that begin with the trunk's output: a trunk of one layer is a model, too.
    plain = regrown_config(cfg, 1, HeadsConfig(kind="linear"))
    family = family_of(plain)
    with jax.set_mesh(model.mesh):
        init, _ = model_builder(plain)
        shapes = jax.eval_shape(init, jax.random.key(0))
        of_one = jax.device_get(regrown(cfg, plain, model.params, shapes))
    llama = _tensors(places_of(plain, hf_names(family), shapes), of_one)
    heads, dropped = cfg.heads, ""
    if cfg.n_future_tokens > 1 and (
        heads.kind not in mtp_heads.NAMES.kinds or heads.shared
    ):
        dropped = f"{'shared ' * heads.shared}{heads.kind} heads"
    found: Arrays = {}
    if cfg.n_future_tokens > 1 and not dropped:
        params = jax.device_get(model.params)
        places = places_of(cfg, hf_names(family, mtp_heads.NAMES), params)
        of_heads = [place for place in places if place.name not in llama]
        found = _tensors(of_heads, params)
    return Parts(model, plain, llama, found, dropped, family)


def _tensors(places: Iterable[Place], params: Any) -> Arrays:
    """The tensors of places, of parameters that are NumPy arrays."""
    found: Arrays = {}
    for place in places:
        rows = to_file(place, _entry(place, params))
        there = found.get(place.name)
        found[place.name] = rows if there is None else np.concatenate([there, rows])
    return {name: np.ascontiguousarray(x) for name, x in found.items()}


def _entry(place: Place, params: Any) -> np.ndarray:
    """The parameter of a place, or the entry of its stack."""
    for key in place.path:
        params = params[key]
    return params if place.entry is None else params[place.entry]
