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
    # A norm of queries and keys before they turn: of each attention head, as Qwen 3
    # does, or of all of them together, as OLMo 2 does.
    qk_norm: QkNorm = "none"
    # The norms of a layer: before attention and feed-forward layer, or of what they
    # give, as OLMo 2 does.
    norms: Literal["before", "after"] = "before"
    # Positions that a query reads at most, itself the last; 0: all before it. Empty:
    # 0; one value: of all layers; or one a trunk layer, and a last one of the heads.
    windows: tuple[int, ...] = ()

    def __post_init__(self):
        require(
            all(w >= 0 for w in self.windows),
            f"config.layer.windows is {self.windows}; a window is at least 1, or 0 for "
            "none.",
        )
