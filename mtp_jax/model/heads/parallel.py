"""From the trunk's output to a head's: how the heads are wired.

Axes: B batch, T time, D model width, K head width, k half of it.

The losses ask only for "the output of one head"; another kind of head that reads the
trunk alone is another function of the signature of `run_head`.
"""

import dataclasses

import jax

from mtp_jax.config import Attention
from mtp_jax.model.attention import causal_attention
from mtp_jax.model.language_model import Attend, Block
from mtp_jax.model.layers import rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a layer must know of packed rows besides their activations."""

    angles_BTk: jax.Array  # rotary angles of the positions, float32
    # Document of each position, int32; 0 is padding. Not split over devices that share
    # a row, and in its order.
    segments_BT: jax.Array


def attend_within(rows: Rows, kernel: Attention) -> Attend:
    """Causal attention within the documents, which keeps nothing."""

    def attend(q_BTHK, k_BTGK, v_BTGK):
        read_BTHK = causal_attention(q_BTHK, k_BTGK, v_BTGK, rows.segments_BT, kernel)
        return read_BTHK, None

    return attend


def run_head(
    head: Block, norm_D: jax.Array, trunk_BTD: jax.Array, rows: Rows, kernel: Attention
) -> jax.Array:
    """Normed output of a head, ready for the unembedding, [B, T, D].

    Parallel heads: each of them reads the trunk's output (arXiv:2404.19737, section 2);
    they share the norm, whose epsilon is that of the layers.
    """
    out_BTD, _ = head(trunk_BTD, rows.angles_BTk, attend_within(rows, kernel))
    return rms_norm(out_BTD, norm_D, head.norm_eps)
