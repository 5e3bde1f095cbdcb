"""Parallel heads: each is one transformer layer over the trunk's output.

Axes: B batch, T time, D model width, K head width, k half of it.

The losses ask only for "the output of one head"; another kind of head that reads the
trunk alone is another function of the signature of `run_head`.
"""

import jax

from mtp_jax.config import Attention
from mtp_jax.model.attention import RowContext, attend_within
from mtp_jax.model.block import Block
from mtp_jax.model.layers import rms_norm


def run_head(
    head: Block,
    norm_D: jax.Array,
    trunk_BTD: jax.Array,
    rows: RowContext,
    kernel: Attention,
) -> jax.Array:
    """Normed output of a head, ready for the unembedding, [B, T, D].

    Parallel heads: each of them reads the trunk's output (arXiv:2404.19737, section 2);
    they share the norm, whose epsilon is that of the layers.
    """
    out_BTD, _ = head(trunk_BTD, rows.angles_BTk, attend_within(rows, kernel))
    return rms_norm(out_BTD, norm_D, head.norm_eps)
