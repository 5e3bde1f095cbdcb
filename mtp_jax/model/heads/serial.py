"""Serial heads: each reads the stream before it, and the token before its own.

DeepSeek-V3's modules (arXiv:2412.19437, section 2.2): the stream and the embedding of
the token before the predicted one, each normed, are joined by a matrix and pass through
a transformer layer. Head 1 has no module: it is the trunk's output, normed.

`config.heads.hidden` before: the stream is the layers' output, as in the paper; after:
it is normed by the last norm, which MiMo's and Qwen's models do.

Axes: B batch, T time, D model width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.model.heads.base import (
    HeadKind,
    Norm,
    Through,
    blocks_of,
    layer_entries,
    layer_vectors,
    make_layers,
)
from mtp_jax.model.layers import project, rms_norm, weight
from mtp_jax.parallel.sharding import spec_like


class Serial(nnx.Module):
    """A module: two norms, the matrix that joins what they give, and layers."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, dtype = cfg.d_model, cfg.param_dtype
        self.norm_hidden = nnx.Param(jnp.ones(d, dtype))
        self.norm_token = nnx.Param(jnp.ones(d, dtype))
        axes = ("embed", None)
        self.w_join = weight(rngs, (2 * d, d), axes, fan_in=2 * d, dtype=dtype)
        self.layers = make_layers(cfg, rngs)


def _make(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    return Serial(cfg, rngs=rngs)


def _run(
    cfg: ModelConfig,
    body,
    norm: Norm,
    x_BTD: jax.Array,
    token_BTD: jax.Array | None,
    through: Through,
) -> jax.Array:
    if body is not None:
        assert token_BTD is not None
        parts = [
            rms_norm(x_BTD, body.norm_hidden.get_value(), cfg.norm_eps),
            rms_norm(token_BTD, body.norm_token.get_value(), cfg.norm_eps),
        ]
        if cfg.heads.concat == "embedding_first":
            parts.reverse()
        joined_BTE = jnp.concatenate(parts, axis=-1)
        out = spec_like(x_BTD, None)
        x_BTD = project("bte,ed->btd", joined_BTE, body.w_join, out)
        for block in blocks_of(cfg, body.layers):
            x_BTD = through(block, x_BTD)
    return norm(x_BTD) if cfg.heads.hidden == "after" else x_BTD


def _finish(cfg: ModelConfig, norm: Norm, stream_BTD: jax.Array) -> jax.Array:
    return stream_BTD if cfg.heads.hidden == "after" else norm(stream_BTD)


def _entries(cfg: ModelConfig) -> int:
    return 2 * cfg.d_model**2 + cfg.heads.layers * layer_entries(cfg)


def _vectors(cfg: ModelConfig) -> int:
    return 2 * cfg.d_model + cfg.heads.layers * layer_vectors(cfg)


KIND = HeadKind(
    make=_make, run=_run, finish=_finish, entries=_entries, vectors=_vectors
)
