"""Arithmetic of a training step, and what chips can do.

Axes: D model width, T row length, V vocabulary.
"""

import jax

from mtp_jax.config import Config, ModelConfig

# Dense bfloat16 peaks in FLOP/s per device, as the makers state them, by the beginning
# of jax's device_kind; the first that fits counts.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def layer_params(cfg: ModelConfig) -> int:
    """Matrix entries of one transformer layer."""
    attention = cfg.d_model * cfg.d_head * 2 * (cfg.num_query_heads + cfg.num_kv_heads)
    return attention + 3 * cfg.d_model * cfg.d_ff


def train_flops_per_token(cfg: Config) -> float:
    """FLOPs of the forward and backward pass for one position of a row.

    6 a matrix entry (2 forward, 4 backward; arXiv:2001.08361, section 2.1), counting
    the unembedding once for every head, plus 12 T D / 2 a layer for causal attention.
    Rematerialization is not counted: it is not useful work.
    """
    model = cfg.model
    width = model.num_query_heads * model.d_head
    layers = 6 * layer_params(model) + 6 * cfg.data.seq_len * width
    unembedding = 6 * model.vocab_size * model.d_model
    return float(model.num_layers * layers + model.n_future_tokens * unembedding)


def peak_flops(device: jax.Device) -> float | None:
    """Peak of one device in FLOP/s, None if it is not in the table."""
    for kind, peak in _PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return peak
    return None


def mfu(cfg: Config, step_s: float) -> float | None:
    """Model FLOPs utilization of a step of `step_s` seconds, None on unknown chips."""
    peak = peak_flops(jax.devices()[0])
    if peak is None:
        return None
    positions = cfg.data.batch_size * cfg.data.seq_len
    flops = train_flops_per_token(cfg) * positions
    return flops / (step_s * peak * jax.device_count())
