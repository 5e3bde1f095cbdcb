"""Arithmetic of a training step, and what chips can do.

Axes: D model width, T row length, V vocabulary.
"""

import dataclasses

import jax

from mtp_jax.config import Config, ModelConfig

GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of jax can do, by its makers' figures."""

    peak_flops: float  # dense bfloat16, FLOP/s
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # sent to other chips over all links at once, one way
    dcn_bytes_per_s: float | None = None  # sent to other slices; None: not known
    cores: int = 1  # of a chip; a device of jax is a chip or one core of it
    cores_of_device: int = 1  # where the device does not say

    def __mul__(self, share: float) -> "Chip":
        return dataclasses.replace(
            self,
            peak_flops=self.peak_flops * share,
            hbm_bytes=self.hbm_bytes * share,
            hbm_bytes_per_s=self.hbm_bytes_per_s * share,
            link_bytes_per_s=self.link_bytes_per_s * share,
            dcn_bytes_per_s=self.dcn_bytes_per_s and self.dcn_bytes_per_s * share,
        )


# Whole chips, by the beginning of jax's device_kind; the first that fits counts.
# TPUs: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, "System
# architecture"; links are half of the "bidirectional" figure, which counts both ways;
# the network between slices is a chip's share of the NICs of its host, that of v5p from
# jax-ml.github.io/scaling-book, "How to Parallelize a Transformer".
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200; NVLink.
_V5E = Chip(197e12, 16 * GIB, 819 * GB, 200 * GB, 3.125 * GB)
_V5P = Chip(
    459e12, 95 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, cores=2, cores_of_device=2
)
_V6E = Chip(918e12, 32 * GIB, 1638 * GB, 400 * GB, 12.5 * GB)
_CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1228 * GB, 300 * GB, cores=2, cores_of_device=2),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5p": _V5P,
    "TPU v5": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip(2307e12, 192 * GIB, 7380 * GB, 600 * GB, cores=2),
    "NVIDIA A100": Chip(312e12, 80 * GB, 2039 * GB, 300 * GB),
    "NVIDIA H100": Chip(989e12, 80 * GB, 3350 * GB, 450 * GB),
    "NVIDIA H200": Chip(989e12, 141 * GB, 4800 * GB, 450 * GB),
    "NVIDIA B200": Chip(2250e12, 180 * GB, 7700 * GB, 900 * GB),
}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by the part of the model that they are spent in."""

    trunk: float
    heads: float  # the heads' layers
    unembedding: float  # once a head

    @property
    def total(self) -> float:
        return self.trunk + self.heads + self.unembedding

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.trunk * times, self.heads * times, self.unembedding * times)


def layer_params(cfg: ModelConfig) -> int:
    """Matrix entries of one transformer layer."""
    attention = cfg.d_model * cfg.d_head * 2 * (cfg.num_query_heads + cfg.num_kv_heads)
    return attention + 3 * cfg.d_model * cfg.d_ff


def _attention_flops(cfg: Config) -> float:
    """Of one layer's forward pass for one position: half of 4 T D, as it is causal."""
    return 2 * cfg.data.seq_len * cfg.model.num_query_heads * cfg.model.d_head


def train_flops(cfg: Config) -> Flops:
    """FLOPs of the forward and backward pass for one position of a row.

    6 a matrix entry (2 forward, 4 backward; arXiv:2001.08361, section 2.1), counting
    the unembedding once for every head, plus 12 T D / 2 a layer for causal attention.
    Rematerialization is not counted: it is not useful work.
    """
    model = cfg.model
    layer = 6 * layer_params(model) + 3 * _attention_flops(cfg)
    n = model.n_future_tokens
    unembedding = 6 * model.vocab_size * model.d_model
    return Flops(model.num_trunk_layers * layer, n * layer, n * float(unembedding))


def executed_flops(cfg: Config) -> Flops:
    """`train_flops` and what config.compute has computed again in the backward pass.

    Trunk layers are computed again as `remat` says: not at all, the attention alone
    (where the products with weights are kept), or wholly; heads and unembedding, under
    the head loss of that name. What an attention kernel computes again by itself is not
    counted.
    """
    useful, compute = train_flops(cfg), cfg.compute
    attention = cfg.model.num_trunk_layers * _attention_flops(cfg)
    again = {"none": 0.0, "dots": attention}.get(compute.remat, useful.trunk / 3)
    of_heads = 4 / 3 if compute.head_loss == "remat" else 1.0
    return Flops(
        useful.trunk + again, useful.heads * of_heads, useful.unembedding * of_heads
    )


def train_flops_per_token(cfg: Config) -> float:
    """`train_flops`, all parts together."""
    return train_flops(cfg).total


def chip_share(device: jax.Device) -> float:
    """Which part of a chip a device of jax is: a core of two, or all of it.

    Devices of unknown kinds count as a chip each.
    """
    chip = _chip(device)
    if chip is None:
        return 1.0
    return getattr(device, "num_cores", chip.cores_of_device) / chip.cores


def device_figures(device: jax.Device) -> Chip | None:
    """What one device of jax can do, None if its kind is not in the table."""
    chip = _chip(device)
    return chip and chip * chip_share(device)


def _chip(device: jax.Device) -> Chip | None:
    kinds = (kind for kind in _CHIPS if device.device_kind.startswith(kind))
    return _CHIPS.get(next(kinds, ""))


def peak_flops(device: jax.Device) -> float | None:
    """Peak of one device in FLOP/s, None if it is not in the table."""
    figures = device_figures(device)
    return figures.peak_flops if figures else None


def mfu(cfg: Config, step_s: float) -> float | None:
    """Model FLOPs utilization of a step of `step_s` seconds, None on unknown chips."""
    peak = peak_flops(jax.devices()[0])
    if peak is None:
        return None
    positions = cfg.data.batch_size * cfg.data.seq_len
    flops = train_flops_per_token(cfg) * positions
    return flops / (step_s * peak * jax.device_count())
