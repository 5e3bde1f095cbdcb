"""Small random models to be exported, and their texts."""

import dataclasses

import jax
import numpy as np
from models import TINY, mesh_of, placed_params, random_params

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import (
    Config,
    DataConfig,
    HeadsConfig,
    LayerConfig,
    RopeConfig,
)
from mtp_jax.config.regrow import regrown_config
from mtp_jax.data.tokenizer import ByteTokenizer

BASE = dataclasses.replace(
    TINY, vocab_size=256, num_layers=3, n_future_tokens=1, rope_theta=500.0
)

_ALL_BIASES = LayerConfig(qkv_bias=True, out_bias=True, mlp_bias=True)
_LLAMA3 = RopeConfig(scaling="llama3", factor=4.0, original_context=8, context=64)
_YARN = RopeConfig(scaling="yarn", factor=4.0, original_context=16, context=64)
_LINEAR = RopeConfig(scaling="linear", factor=2.0, context=64)
# Fields of a model by the family that holds it.
FAMILIES = {
    "llama": {"layer": _ALL_BIASES, "rope": _LLAMA3, "d_head": 6},
    "mistral": {"layer": LayerConfig(windows=(5,))},
    "qwen2": {"layer": LayerConfig(qkv_bias=True)},
    "qwen3": {"layer": LayerConfig(qk_norm="head"), "d_head": 8, "rope": _YARN},
    "olmo2": {"layer": LayerConfig(qk_norm="whole", norms="after"), "rope": _LINEAR},
}


def random_model(n=3, tokenizer=None, size=1.0, mesh=None, of_model=None, **heads):
    """A restored model of random parameters, larger or smaller by `size`."""
    base = dataclasses.replace(BASE, **(of_model or {}))
    cfg = regrown_config(base, n, HeadsConfig(**heads))
    mesh = mesh or mesh_of()
    with jax.set_mesh(mesh):
        params = jax.tree.map_with_path(
            lambda path, x: x * size if path[-1].key.startswith("w_") else x,
            random_params(cfg),
        )
        placed = placed_params(cfg, params)
    data = DataConfig(sources=("nowhere",), seq_len=64)
    config = Config(model=cfg, data=data)
    return Restored(config, placed, mesh, 7, tokenizer or ByteTokenizer())


def ids(count=11, seed=4, vocab=250):
    return np.random.default_rng(seed).integers(0, vocab, count)
