"""The language model: one trunk, n heads, one norm and one unembedding for all heads.

Axes: B batch, T time, D model width, H query heads, G key-value heads, K head width,
V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import ModelConfig, Remat
from mtp_jax.model.layers import (
    MLP,
    apply_rope,
    embed,
    project,
    rms_norm,
    rope_angles,
    stack,
    weight,
)
from mtp_jax.parallel.sharding import spec, spec_like

# Takes queries [B, T, H, K], keys and values [B, T, G, K]; gives what they read
# [B, T, H, K] and whatever the caller wants to keep of them (a cache, or nothing).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Block(nnx.Module):
    """One pre-norm transformer layer, of the trunk or of a head."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, k, dtype = cfg.d_model, cfg.d_head, cfg.param_dtype
        h, g = cfg.num_query_heads, cfg.num_kv_heads
        by_head = ("embed", "heads", None)
        self.norm_eps = cfg.norm_eps
        self.norm_attention = nnx.Param(jnp.ones(d, dtype))
        self.w_q = weight(rngs, (d, h, k), by_head, fan_in=d, dtype=dtype)
        self.w_k = weight(rngs, (d, g, k), by_head, fan_in=d, dtype=dtype)
        self.w_v = weight(rngs, (d, g, k), by_head, fan_in=d, dtype=dtype)
        back = ("heads", None, "embed")
        self.w_o = weight(rngs, (h, k, d), back, fan_in=h * k, dtype=dtype)
        self.norm_mlp = nnx.Param(jnp.ones(d, dtype))
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, angles_BTk: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """x_BTD after the layer, and what `attend` keeps."""
        by_head = spec_like(x_BTD, "heads", None)
        h_BTD = rms_norm(x_BTD, self.norm_attention.get_value(), self.norm_eps)
        q_BTHK = apply_rope(
            project("btd,dhk->bthk", h_BTD, self.w_q, by_head), angles_BTk
        )
        k_BTGK = apply_rope(
            project("btd,dgk->btgk", h_BTD, self.w_k, by_head), angles_BTk
        )
        v_BTGK = project("btd,dgk->btgk", h_BTD, self.w_v, by_head)
        read_BTHK, kept = attend(q_BTHK, k_BTGK, v_BTGK)
        whole = spec_like(x_BTD, None)
        x_BTD = x_BTD + project("bthk,hkd->btd", read_BTHK, self.w_o, whole)
        h_BTD = rms_norm(x_BTD, self.norm_mlp.get_value(), self.norm_eps)
        return x_BTD + self.mlp(h_BTD), kept


class LanguageModel(nnx.Module):
    """Parallel multi-token prediction (arXiv:2404.19737, section 2).

    P(x_{t+i} | x_<=t) = softmax(unembedding(norm(head_i(trunk(x_<=t))))), i = 1..n.
    The trunk has num_layers - n layers and every head has one, so the number of
    parameters does not depend on n, and n = 1 is an ordinary transformer.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg

        def table() -> nnx.Param:
            shape, axes = (cfg.vocab_size, cfg.d_model), ("vocab", "embed")
            return weight(rngs, shape, axes, fan_in=cfg.d_model, dtype=cfg.param_dtype)

        self.w_embedding = table()
        if not cfg.tie_embeddings:
            self.w_unembedding = table()

        def block(rngs):
            return Block(cfg, rngs=rngs)

        self.trunk = stack(block, cfg.num_trunk_layers, rngs=rngs)
        self.heads = stack(block, cfg.n_future_tokens, rngs=rngs)
        self.norm = nnx.Param(jnp.ones(cfg.d_model, cfg.param_dtype))

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Token embeddings in the compute dtype, [B, T, D]."""
        return embed(self.w_embedding[...], tokens_BT, self.cfg.compute_dtype)

    def angles(self, positions_BT: jax.Array) -> jax.Array:
        """Rotary angles of the positions, float32 [B, T, K/2]."""
        return rope_angles(positions_BT, self.cfg.d_head, self.cfg.rope_theta)

    def unembedding_param(self) -> jax.Array:
        """The output matrix as it is stored, [V, D]."""
        tied = self.cfg.tie_embeddings
        return (self.w_embedding if tied else self.w_unembedding)[...]

    def unembedding(self) -> jax.Array:
        """The output matrix in the compute dtype, [V, D], gathered in width."""
        w_VD = self.unembedding_param().astype(self.cfg.compute_dtype)
        return jax.sharding.reshard(w_VD, spec("vocab", None))

    def logits(self, x_BTD: jax.Array, unembedding_VD: jax.Array) -> jax.Array:
        """Scores of the vocabulary from a head's output, float32 [B, T, V]."""
        return jnp.einsum(
            "btd,vd->btv",
            rms_norm(x_BTD, self.norm[...], self.cfg.norm_eps),
            unembedding_VD,
            out_sharding=spec_like(x_BTD, "vocab"),
            preferred_element_type=jnp.float32,
        )


def run_trunk(
    model: LanguageModel,
    x_BTD: jax.Array,
    angles_BTk: jax.Array,
    attend: Attend,
    remat: Remat = "full",
) -> jax.Array:
    """Trunk output [B, T, D] of embeddings x_BTD, for training and evaluation.

    `remat` says what the forward pass keeps of a layer for the backward pass, which
    computes the rest again:
      none: everything the backward pass reads.
      dots: the layer's input, and the products with its weights.
      full: the layer's input.
      offload: the layer's input, in the memory of the host; on the devices, nothing.
    """

    def layer(x_BTD, block):
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        return block(x_BTD, angles_BTk, attend)

    policies = jax.checkpoint_policies
    policy = {
        "none": policies.everything_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    # prevent_cse keeps the compiler from undoing it; inside a scan it cannot anyway.
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return jax.lax.scan(layer, x_BTD, model.trunk)[0]
