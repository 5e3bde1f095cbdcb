"""Rotary positions beyond the context that a model was first trained on."""

import dataclasses
import math
from typing import Literal

from mtp_jax.config.checks import require, require_at_least

Scaling = Literal["none", "linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How rotary frequencies are stretched, under the names of Hugging Face's files.

    linear divides all of them by `factor` (arXiv:2306.15595); llama3 divides those that
    turn fewer than `low_freq_factor` times within `original_context`, keeps those that
    turn more than `high_freq_factor` times, and blends between (Llama 3.1); yarn
    likewise, with `beta_slow` and `beta_fast` turns, and scales scores of attention
    (arXiv:2309.00071, section 3).
    """

    scaling: Scaling = "none"  # which frequencies become slower
    factor: float = 1.0  # by how much
    original_context: int = 0  # positions before that; of llama3 and yarn
    low_freq_factor: float = 1.0  # of llama3
    high_freq_factor: float = 4.0  # of llama3
    beta_fast: float = 32.0  # of yarn
    beta_slow: float = 1.0  # of yarn
    truncate: bool = True  # of yarn: its bounds are whole numbers
    attention_factor: float = 0.0  # of yarn, on queries and keys; 0: 0.1 ln factor + 1
    context: int = 0  # positions that the model is made for; 0: config.data.seq_len

    def __post_init__(self):
        require_at_least(
            "rope",
            0,
            original_context=self.original_context,
            attention_factor=self.attention_factor,
            context=self.context,
        )
        require(
            self.scaling != "none" or self.factor == 1.0,
            f"config.rope.factor is {self.factor} and config.rope.scaling is none; set "
            "config.rope.scaling=linear, llama3 or yarn.",
        )
        if self.scaling != "none":
            require(
                self.factor >= 1,
                f"config.rope.factor is {self.factor}; it must be at least 1.",
            )
        if self.scaling in ("llama3", "yarn"):
            require(
                self.original_context >= 1,
                f"config.rope.scaling is {self.scaling}, which needs "
                "config.rope.original_context, the positions before the scaling.",
            )
        low, high = self.low_freq_factor, self.high_freq_factor
        require(
            self.scaling != "llama3" or 0 < low < high,
            f"config.rope.low_freq_factor ({low}) must be above 0 and below "
            f"config.rope.high_freq_factor ({high}).",
        )
        slow, fast = self.beta_slow, self.beta_fast
        require(
            self.scaling != "yarn" or 0 < slow <= fast,
            f"config.rope.beta_slow ({slow}) must be above 0 and at most "
            f"config.rope.beta_fast ({fast}).",
        )

    @property
    def on_queries_and_keys(self) -> float:
        """What queries and keys are multiplied with beside turning, 1 but for yarn."""
        if self.scaling != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(self.factor) + 1.0
