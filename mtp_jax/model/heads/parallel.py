"""Parallel heads: each is a transformer layer over the trunk's output.

arXiv:2404.19737, section 2. With `config.heads.layers` each is several layers.

Axes: B batch, T time, D model width.
"""

import jax

from mtp_jax.config import ModelConfig
from mtp_jax.model.heads.base import (
    HeadKind,
    Through,
    blocks_of,
    layer_entries,
    layer_vectors,
    make_layers,
    normed,
)


def run_layers(
    cfg: ModelConfig, body, norm, x_BTD: jax.Array, token_BTD, through: Through
) -> jax.Array:
    """`HeadKind.run` of a body that is transformer layers and no more."""
    del norm, token_BTD
    for block in blocks_of(cfg, body):
        x_BTD = through(block, x_BTD)
    return x_BTD


def entries(cfg: ModelConfig) -> int:
    """Matrix entries of the layers of a head."""
    return cfg.heads.layers * layer_entries(cfg)


def vectors(cfg: ModelConfig) -> int:
    """Scales of norms and biases in the layers of a head."""
    return cfg.heads.layers * layer_vectors(cfg)


KIND = HeadKind(
    make=make_layers,
    run=run_layers,
    finish=normed,
    entries=entries,
    vectors=vectors,
)
