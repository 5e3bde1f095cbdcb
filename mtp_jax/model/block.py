"""One transformer layer, of the trunk or of a head.

Axes: B batch, T time, D model width, H query heads, G key-value heads, K head width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.model.layers import MLP, biased, project, rms_norm, weight, zeros
from mtp_jax.model.rope import apply_rope
from mtp_jax.parallel.sharding import spec, spec_like

# Takes queries [B, T, H, K], keys and values [B, T, G, K]; gives what they read
# [B, T, H, K] and whatever the caller wants to keep of them (a cache, or nothing).
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Block(nnx.Module):
    """One transformer layer, of the trunk or of a head, as `config.layer` says.

    With norms before (Llama), or of what attention and feed-forward layer give (OLMo 2,
    arXiv:2501.00656, section 3.2).
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, k, dtype = cfg.d_model, cfg.d_head, cfg.param_dtype
        h, g = cfg.num_query_heads, cfg.num_kv_heads
        by_head = ("embed", "heads", None)
        self.norm_eps = cfg.norm_eps
        self.norms_first = cfg.layer.norms == "before"
        self.rope_factor = cfg.rope.on_queries_and_keys
        self.norm_attention = nnx.Param(jnp.ones(d, dtype))
        self.w_q = weight(rngs, (d, h, k), by_head, fan_in=d, dtype=dtype)
        self.w_k = weight(rngs, (d, g, k), by_head, fan_in=d, dtype=dtype)
        self.w_v = weight(rngs, (d, g, k), by_head, fan_in=d, dtype=dtype)
        back = ("heads", None, "embed")
        self.w_o = weight(rngs, (h, k, d), back, fan_in=h * k, dtype=dtype)
        self.norm_mlp = nnx.Param(jnp.ones(d, dtype))
        self.mlp = MLP(cfg, rngs=rngs)
        each = ("heads", None)
        has_bias = cfg.layer.qkv_bias
        self.bias_q = zeros((h, k), each, dtype) if has_bias else None
        self.bias_k = zeros((g, k), each, dtype) if has_bias else None
        self.bias_v = zeros((g, k), each, dtype) if has_bias else None
        self.bias_o = zeros((d,), (None,), dtype) if cfg.layer.out_bias else None
        self.norm_q, self.norm_k = _norms_of_queries_and_keys(cfg)

    def __call__(
        self, x_BTD: jax.Array, angles_BTk: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """x_BTD after the layer, and what `attend` keeps."""
        h_BTD = self._norm(x_BTD, self.norm_attention, first=True)
        read_BTHK, kept = attend(*self._qkv(h_BTD, angles_BTk))
        whole = spec_like(x_BTD, None)
        out_BTD = project("bthk,hkd->btd", read_BTHK, self.w_o, whole)
        out_BTD = biased(out_BTD, self.bias_o)
        x_BTD = x_BTD + self._norm(out_BTD, self.norm_attention, first=False)
        h_BTD = self._norm(x_BTD, self.norm_mlp, first=True)
        return x_BTD + self._norm(self.mlp(h_BTD), self.norm_mlp, first=False), kept

    def _qkv(
        self, h_BTD: jax.Array, angles_BTk: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values as attention takes them."""
        by_head = spec_like(h_BTD, "heads", None)

        def turned(equation, w, bias, norm):
            x_BTHK = biased(project(equation, h_BTD, w, by_head), bias)
            if norm is not None:
                x_BTHK = rms_norm(x_BTHK, norm.get_value(), self.norm_eps)
            return apply_rope(x_BTHK, angles_BTk, self.rope_factor)

        q_BTHK = turned("btd,dhk->bthk", self.w_q, self.bias_q, self.norm_q)
        k_BTGK = turned("btd,dgk->btgk", self.w_k, self.bias_k, self.norm_k)
        v_BTGK = project("btd,dgk->btgk", h_BTD, self.w_v, by_head)
        return q_BTHK, k_BTGK, biased(v_BTGK, self.bias_v)

    def _norm(self, x_BTD: jax.Array, scale: nnx.Param, first: bool) -> jax.Array:
        """x normed, if this is where the norms of the layer stand; else x."""
        if first != self.norms_first:
            return x_BTD
        return rms_norm(x_BTD, scale.get_value(), self.norm_eps)


def _norms_of_queries_and_keys(
    cfg: ModelConfig,
) -> tuple[nnx.Param | None, nnx.Param | None]:
    """Their scales: [K] of each head, or [H, K] and [G, K] of all together."""
    if cfg.layer.qk_norm == "none":
        return None, None
    if cfg.layer.qk_norm == "head":
        q, k = (nnx.Param(jnp.ones(cfg.d_head, cfg.param_dtype)) for _ in range(2))
        return q, k
    q, k = (
        nnx.Param(
            jnp.ones(
                (heads, cfg.d_head), cfg.param_dtype, out_sharding=spec("heads", None)
            )
        )
        for heads in (cfg.num_query_heads, cfg.num_kv_heads)
    )
    return q, k
