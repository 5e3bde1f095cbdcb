"""Linear heads: each is a matrix over the trunk's output.

arXiv:2404.19737, appendix B. Head 1 has none, so that one head is an ordinary model.

Axes: B batch, T time, D model width.
"""

import jax
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.model.heads.base import HeadKind, Through, normed
from mtp_jax.model.layers import project, weight
from mtp_jax.parallel.sharding import spec_like


class Linear(nnx.Module):
    """A square matrix, without a bias."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d = cfg.d_model
        axes = ("embed", None)
        self.w_map = weight(rngs, (d, d), axes, fan_in=d, dtype=cfg.param_dtype)


def _make(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    return Linear(cfg, rngs=rngs)


def _run(
    cfg: ModelConfig, body, norm, x_BTD: jax.Array, token_BTD, through: Through
) -> jax.Array:
    del cfg, norm, token_BTD, through
    if body is None:
        return x_BTD
    return project("btd,de->bte", x_BTD, body.w_map, spec_like(x_BTD, None))


def _entries(cfg: ModelConfig) -> int:
    return cfg.d_model**2


def _vectors(cfg: ModelConfig) -> int:
    del cfg
    return 0


KIND = HeadKind(make=_make, run=_run, finish=normed, entries=_entries, vectors=_vectors)
