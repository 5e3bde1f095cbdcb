"""Residual heads: small residual blocks over the normed trunk output.

Medusa's (arXiv:2401.10774, section 2.1): r + silu(W r + b), `config.heads.layers` of
them one after another, each with weights of its own, and no second norm. They begin as
the identity. Head 1 has none.

Axes: B batch, T time, D model width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.model.heads.base import HeadKind, Norm, Through
from mtp_jax.model.layers import project
from mtp_jax.parallel.sharding import spec, spec_like


class Residual(nnx.Module):
    """The blocks of a head, as w_0 and bias_0, w_1 and bias_1 ..."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        del rngs  # they begin as zeros
        d, dtype = cfg.d_model, cfg.param_dtype
        for i in range(cfg.heads.layers):
            zeros = jnp.zeros((d, d), dtype, out_sharding=spec("embed", None))
            setattr(self, f"w_{i}", nnx.Param(zeros))
            setattr(self, f"bias_{i}", nnx.Param(jnp.zeros(d, dtype)))


def _make(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    return Residual(cfg, rngs=rngs)


def _run(
    cfg: ModelConfig, body, norm: Norm, x_BTD: jax.Array, token_BTD, through: Through
) -> jax.Array:
    del token_BTD, through
    x_BTD = norm(x_BTD)
    for i in range(cfg.heads.layers if body is not None else 0):
        w, bias = getattr(body, f"w_{i}"), getattr(body, f"bias_{i}")
        inner_BTD = project("btd,de->bte", x_BTD, w, spec_like(x_BTD, None))
        bias_11D = bias.get_value().astype(x_BTD.dtype)[None, None]
        x_BTD = x_BTD + jax.nn.silu(inner_BTD + bias_11D)
    return x_BTD


def _finish(cfg: ModelConfig, norm: Norm, stream_BTD: jax.Array) -> jax.Array:
    del cfg, norm  # the stream is of normed states already
    return stream_BTD


def _entries(cfg: ModelConfig) -> int:
    return cfg.heads.layers * cfg.d_model**2


def _vectors(cfg: ModelConfig) -> int:
    return cfg.heads.layers * cfg.d_model


KIND = HeadKind(
    make=_make, run=_run, finish=_finish, entries=_entries, vectors=_vectors
)
