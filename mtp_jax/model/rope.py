"""Rotary positions, as they are and stretched.

Axes: B batch, T time, H attention heads, K head width, k half of it: frequencies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ModelConfig, RopeConfig


def rope_angles(positions_BT: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Angle of every position and frequency, in radians, float32 [B, T, K/2].

    Frequency j is theta^(-2j/K) (arXiv:2104.09864, section 3.2.2), stretched as
    `config.rope` says.
    """
    if cfg.rope.scaling == "none":
        exponent_k = jnp.arange(0, cfg.d_head, 2, dtype=jnp.float32) / cfg.d_head
        frequency_11k = cfg.rope_theta ** -exponent_k[None, None]
    else:
        frequency_k = frequencies(cfg.rope, cfg.d_head, cfg.rope_theta)
        frequency_11k = jnp.asarray(frequency_k, jnp.float32)[None, None]
    return positions_BT[:, :, None].astype(jnp.float32) * frequency_11k


def frequencies(cfg: RopeConfig, d_head: int, theta: float) -> np.ndarray:
    """Radians that each pair turns from one position to the next, float64 [K/2]."""
    plain_k = theta ** (-np.arange(0, d_head, 2) / d_head)
    if cfg.scaling == "none":
        return plain_k
    if cfg.scaling == "linear":
        return plain_k / cfg.factor
    if cfg.scaling == "llama3":
        turns_k = cfg.original_context * plain_k / (2 * math.pi)
        low, high = cfg.low_freq_factor, cfg.high_freq_factor
        kept_k = np.clip((turns_k - low) / (high - low), 0.0, 1.0)
    else:
        kept_k = 1.0 - _ramp_of_yarn(cfg, d_head, theta)
    return plain_k * ((1.0 - kept_k) / cfg.factor + kept_k)


def _ramp_of_yarn(cfg: RopeConfig, d_head: int, theta: float) -> np.ndarray:
    """0 for pairs that keep their frequency, 1 for those that are divided, [K/2].

    arXiv:2309.00071, equations 18 and 23, as a line between two indices of pairs.
    """

    def pair_of(turns: float) -> float:
        """The index of the pair that turns so often within the original context."""
        wavelength = cfg.original_context / (turns * 2 * math.pi)
        return d_head * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair_of(cfg.beta_fast), pair_of(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_head - 1)
    width = high - low if high != low else 0.001
    return np.clip((np.arange(d_head // 2) - low) / width, 0.0, 1.0)


def apply_rope(
    x_BTHK: jax.Array, angles_BTk: jax.Array, factor: float = 1.0
) -> jax.Array:
    """Rotates the pairs (j, j + K/2) of each head: the half-split layout of Llama in
    Hugging Face's transformers. In float32, times `factor`, returned in the dtype of x.
    """
    cos, sin = jnp.cos(angles_BTk), jnp.sin(angles_BTk)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    cos_BT1K = jnp.concatenate([cos, cos], axis=-1)[:, :, None]
    sin_BT1K = jnp.concatenate([-sin, sin], axis=-1)[:, :, None]
    # The halves change places before anything is widened, so that nothing of half the
    # width, which chips pad to the whole, or of float32 need be written.
    first, second = jnp.split(x_BTHK, 2, axis=-1)
    swapped_BTHK = jnp.concatenate([second, first], axis=-1)
    x32, swapped32 = (x.astype(jnp.float32) for x in (x_BTHK, swapped_BTHK))
    return (x32 * cos_BT1K + swapped32 * sin_BT1K).astype(x_BTHK.dtype)
