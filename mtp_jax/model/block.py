"""One transformer layer, of the trunk or of a head.

Axes: B batch, T time, D model width, H query heads, G key-value heads, K head width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.model.layers import MLP, apply_rope, project, rms_norm, weight
from mtp_jax.parallel.sharding import spec_like

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
