"""The interface of a kind of heads, and the layers that several kinds are made of.

Axes: B batch, T time, D model width.

A head has a body, its weights besides norms and tables; where head 1 has none, it is
the norm of the trunk's output. `HeadKind.run` gives the head's stream, which is what
the next head of a chain reads, `HeadKind.finish` what the unembedding reads. Who reads
whom is in `mtp_jax.config.heads`, since sizes depend on it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.model.block import Block

Norm = Callable[[jax.Array], jax.Array]  # the last norm of a head, with its scale
# Runs a transformer layer over x [B, T, D]: within packed rows, or through a cache.
Through = Callable[[Block, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class HeadKind:
    """All that training, decoding and counting ask of a kind of heads.

    make(cfg, rngs): the body of one head, a module.
    run(cfg, body, norm, x_BTD, token_BTD, through): the stream of a head, [B, T, D], of
      what it reads, by the wiring of its kind the trunk's output or a stream, and of
      the embedding of the token before the one that it predicts, or None. A body of
      None is that of a head 1 that has none.
    finish(cfg, norm, stream_BTD): normed output, ready for the unembedding, [B, T, D].
    entries(cfg): matrix entries of a body, each of which a token is multiplied with.
    vectors(cfg): its other parameters, scales of norms and biases.
    """

    make: Callable[[ModelConfig, nnx.Rngs], nnx.Module]
    run: Callable[..., jax.Array]
    finish: Callable[[ModelConfig, Norm, jax.Array], jax.Array]
    entries: Callable[[ModelConfig], int]
    vectors: Callable[[ModelConfig], int]


class Layers(nnx.Module):
    """Two or more transformer layers, one after another, as layer_0, layer_1 ..."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        for i in range(cfg.heads.layers):
            setattr(self, f"layer_{i}", Block(cfg, rngs=rngs))


def make_layers(cfg: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    """The transformer layers of a head: one, as it is, or several."""
    several = cfg.heads.layers > 1
    return Layers(cfg, rngs=rngs) if several else Block(cfg, rngs=rngs)


def blocks_of(cfg: ModelConfig, layers: Any) -> list[Block]:
    """The transformer layers that `make_layers` made, in their order."""
    if cfg.heads.layers == 1:
        return [layers]
    return [getattr(layers, f"layer_{i}") for i in range(cfg.heads.layers)]


def layer_entries(cfg: ModelConfig) -> int:
    """Matrix entries of one transformer layer."""
    attention = cfg.d_model * cfg.d_head * 2 * (cfg.num_query_heads + cfg.num_kv_heads)
    return attention + 3 * cfg.d_model * cfg.d_ff


def layer_vectors(cfg: ModelConfig) -> int:
    """Scales of norms and biases of one transformer layer."""
    layer, d, k = cfg.layer, cfg.d_model, cfg.d_head
    h, g = cfg.num_query_heads, cfg.num_kv_heads
    found = 2 * d
    found += (h + 2 * g) * k if layer.qkv_bias else 0
    found += d if layer.out_bias else 0
    found += 2 * cfg.d_ff + d if layer.mlp_bias else 0
    return found + {"none": 0, "head": 2 * k, "whole": (h + g) * k}[layer.qk_norm]


def normed(cfg: ModelConfig, norm: Norm, stream_BTD: jax.Array) -> jax.Array:
    """`HeadKind.finish` of heads whose stream is not normed yet."""
    del cfg
    return norm(stream_BTD)
