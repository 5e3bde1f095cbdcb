"""Names of tensors in Hugging Face's folders, by family."""

from mtp_jax.interop.places import HeadNames, Names

_LAYER = {
    "norm_attention": "input_layernorm.weight",
    "w_q": "self_attn.q_proj.weight",
    "w_k": "self_attn.k_proj.weight",
    "w_v": "self_attn.v_proj.weight",
    "w_o": "self_attn.o_proj.weight",
    "bias_q": "self_attn.q_proj.bias",
    "bias_k": "self_attn.k_proj.bias",
    "bias_v": "self_attn.v_proj.bias",
    "bias_o": "self_attn.o_proj.bias",
    "norm_q": "self_attn.q_norm.weight",
    "norm_k": "self_attn.k_norm.weight",
    "norm_mlp": "post_attention_layernorm.weight",
    "mlp/w_gate": "mlp.gate_proj.weight",
    "mlp/w_up": "mlp.up_proj.weight",
    "mlp/w_down": "mlp.down_proj.weight",
    "mlp/bias_gate": "mlp.gate_proj.bias",
    "mlp/bias_up": "mlp.up_proj.bias",
    "mlp/bias_down": "mlp.down_proj.bias",
}
# Families whose names are others: several of ours in one tensor, norms elsewhere.
_OTHERS = {
    "phi3": {
        "w_q": "self_attn.qkv_proj.weight",
        "w_k": "self_attn.qkv_proj.weight",
        "w_v": "self_attn.qkv_proj.weight",
        "mlp/w_gate": "mlp.gate_up_proj.weight",
        "mlp/w_up": "mlp.gate_up_proj.weight",
    },
    "olmo2": {
        "norm_attention": "post_attention_layernorm.weight",
        "norm_mlp": "post_feedforward_layernorm.weight",
    },
}


def hf_names(family: str, heads: HeadNames | None = None) -> Names:
    """The names of a family, a key of `hf_config.FAMILIES`.

    Args:
      family: which one.
      heads: names of further heads; None: the files hold none.
    """
    return Names(
        embedding="model.embed_tokens.weight",
        norm="model.norm.weight",
        unembedding="lm_head.weight",
        layers="model.layers.{}.",
        layer=_LAYER | _OTHERS.get(family, {}),
        heads=heads,
    )
