"""The form of a transformer layer: what differs between families of models."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import require

QkNorm = Literal["none", "head", "whole"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The form of every layer, of the trunk and of heads; Llama's unless set."""

    qkv_bias: bool = False  # added to queries, keys and values, as Qwen 2 does
    out_bias: bool = False  # added to what attention gives
    mlp_bias: bool = False  # added to all three products of the feed-forward layer
    qk_norm: QkNorm = "none"  # of each attention head (Qwen 3), or of all (OLMo 2)
    # Before attention and feed-forward layer, or of what they give, as OLMo 2 has them.
    norms: Literal["before", "after"] = "before"  # where the norms of a layer stand
    # A query is the last position of its window. One value is that of all layers; else
    # there is one a trunk layer, and a last one of the heads.
    windows: tuple[int, ...] = ()  # positions that a query reads at most; 0: all

    def __post_init__(self):
        require(
            all(w >= 0 for w in self.windows),
            f"config.layer.windows is {self.windows}; a window is at least 1, or 0 for "
            "none.",
        )
