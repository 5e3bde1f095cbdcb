"""Small models in the forms of layers that families of models have."""

import dataclasses

from models import TINY

from mtp_jax.config import LayerConfig, RopeConfig

_ONE = dataclasses.replace(TINY, num_layers=4, n_future_tokens=2)
# Every switch once at least; widths of attention that are not the model's; positions of
# tests go beyond the contexts.
FORMS = {
    "biases of queries, keys, values; some windows": dataclasses.replace(
        _ONE, layer=LayerConfig(qkv_bias=True, windows=(0, 3, 5))
    ),
    "all biases, llama3": dataclasses.replace(
        _ONE,
        d_head=8,
        layer=LayerConfig(qkv_bias=True, out_bias=True, mlp_bias=True),
        rope=RopeConfig(scaling="llama3", factor=8.0, original_context=8),
        rope_theta=30.0,
    ),
    "norms of each head, yarn": dataclasses.replace(
        _ONE,
        d_head=8,
        tie_embeddings=True,
        layer=LayerConfig(qk_norm="head"),
        rope=RopeConfig(scaling="yarn", factor=4.0, original_context=8, beta_fast=2.0),
        rope_theta=30.0,
    ),
    "norms after, of all heads, linear": dataclasses.replace(
        _ONE,
        d_head=2,
        layer=LayerConfig(qk_norm="whole", norms="after"),
        rope=RopeConfig(scaling="linear", factor=2.5),
    ),
    "one window": dataclasses.replace(_ONE, layer=LayerConfig(windows=(4,))),
}
