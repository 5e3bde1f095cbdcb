"""A restored model as tensors by name: an ordinary Llama, and the heads beside it.

Names of the heads are those of modules in `modeling_mtp_heads.py`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import HeadsConfig, ModelConfig
from mtp_jax.config.regrow import regrown_config
from mtp_jax.interop.hf_config import family_of, to_hf
from mtp_jax.interop.hf_names import hf_names
from mtp_jax.interop.places import Place, places_of, to_file
from mtp_jax.model.language_model import model_builder
from mtp_jax.model.regrow import regrown

Arrays = dict[str, np.ndarray]
_DRAFTING = ("parallel", "causal", "linear", "residual")


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model to be written."""

    model: Restored
    plain: ModelConfig  # one head, as deep as the way to head 1
    llama: Arrays  # by the names of Hugging Face's Llama; a tied output is left out
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

    def about_heads(self) -> dict[str, Any]:
        """The facts about the heads that the modelling file needs."""
        heads = self.cfg.heads
        return {
            "kind": heads.kind,
            "n_future_tokens": self.cfg.n_future_tokens,
            "layers": heads.layers,
            "norm": heads.norm,
            "unembedding": heads.unembedding,
            "markov_rank": heads.markov_rank,
        }


def parts_of(model: Restored) -> Parts:
    """The tensors of a restored model, on this host.

    Raises:
      UserError: a model that no Llama equals.
    """
    cfg = model.config.model
    plain = regrown_config(cfg, 1, HeadsConfig())
    family = family_of(plain)
    with jax.set_mesh(model.mesh):
        init, _ = model_builder(plain)
        shapes = jax.eval_shape(init, jax.random.key(0))
        of_one = jax.device_get(regrown(cfg, plain, model.params, shapes))
    llama: Arrays = {}
    for place in places_of(plain, hf_names(family), shapes):
        rows = to_file(place, _entry(place, of_one))
        there = llama.get(place.name)
        llama[place.name] = rows if there is None else np.concatenate([there, rows])
    heads, dropped = cfg.heads, ""
    if cfg.n_future_tokens > 1 and (heads.kind not in _DRAFTING or heads.shared):
        dropped = f"{'shared ' * heads.shared}{heads.kind} heads"
    elif cfg.n_future_tokens > 1 and family != "llama":
        dropped = f"{heads.kind} heads on layers of {family}"
    found: Arrays = {}
    if cfg.n_future_tokens > 1 and not dropped:
        found = _contiguous(_head_weights(cfg, jax.device_get(model.params)))
    return Parts(model, plain, _contiguous(llama), found, dropped, family)


def _entry(place: Place, params: Any) -> np.ndarray:
    """The parameter of a place, or the entry of its stack."""
    for key in place.path:
        params = params[key]
    return params if place.entry is None else params[place.entry]


def layer_weights(layer: Any) -> Arrays:
    """The weights of one layer of a Llama by the names of Hugging Face.

    Args:
      layer: nested dict of a layer, NumPy arrays without a stack's axis.
    """
    found = {}
    for ours, theirs in hf_names("llama").layer.items():
        leaf = layer
        for key in ours.split("/"):
            leaf = leaf.get(key) if leaf is not None else None
        if leaf is not None:
            form: Any = "matrix" if ours.rpartition("/")[2][0] == "w" else "vector"
            path = tuple(ours.split("/"))
            found[theirs] = to_file(Place(theirs, path, None, leaf.shape, form), leaf)
    return found


def _head_weights(cfg: ModelConfig, params: Any) -> Arrays:
    heads, found = cfg.heads, {}
    first = 1 if heads.wiring.first else 0
    for number in range(cfg.n_future_tokens - 1):
        body = jax.tree.map(lambda x, i=number + first: x[i], params["heads"])
        prefix = f"heads.{number}."
        for name, x in _body_weights(cfg, body).items():
            found[prefix + name] = x
        if heads.norm == "own":
            found[f"{prefix}norm.weight"] = params["norm"][number + 1]
        if heads.unembedding == "own":
            found[f"{prefix}unembedding.weight"] = params["w_unembedding"][number + 1]
    if heads.markov_rank:
        found["markov_in.weight"] = params["w_markov_in"]
        found["markov_out.weight"] = params["w_markov_out"]
    return found


def _body_weights(cfg: ModelConfig, body: Any) -> Arrays:
    """The weights of one head besides norm and tables."""
    heads = cfg.heads
    if heads.kind == "linear":
        return {"map.weight": body["w_map"].T}
    if heads.kind == "residual":
        return {
            f"blocks.{i}.{name}": x
            for i in range(heads.layers)
            for name, x in (
                ("weight", body[f"w_{i}"].T),
                ("bias", body[f"bias_{i}"]),
            )
        }
    several = heads.layers > 1
    layers = [body[f"layer_{i}"] for i in range(heads.layers)] if several else [body]
    return {
        f"layers.{i}.{name}": x
        for i, layer in enumerate(layers)
        for name, x in layer_weights(layer).items()
    }


def _contiguous(arrays: Arrays) -> Arrays:
    return {name: np.ascontiguousarray(x) for name, x in arrays.items()}
