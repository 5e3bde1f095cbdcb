"""Peak arithmetic, memory and links of the accelerators that are known."""

import dataclasses

import jax

from mtp_jax.errors import UserError

GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of a chip or of one device of jax, by its makers' data sheets."""

    peak_flops: float  # dense bfloat16, FLOP/s
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # sent to other chips over all links at once, one way
    dcn_bytes_per_s: float | None = None  # sent to other slices; None: not known
    cores: int = 1  # of a chip; a device of jax is a chip or one core of it
    cores_of_device: int = 1  # where the device does not say

    def __mul__(self, share: float) -> "Chip":
        """The figures of a share of the chip."""
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


def chip_named(name: str) -> Chip:
    """A whole chip by its name, such as TPU v5e, v5e or h100.

    Raises:
      UserError: none or several have it.
    """
    wanted = name.lower()
    found = [
        chip
        for kind, chip in _CHIPS.items()
        if wanted in (kind.lower(), kind.lower().split(maxsplit=1)[-1])
    ]
    if len(found) != 1:
        raise UserError(f"{name!r} is not a chip; there are {', '.join(_CHIPS)}.")
    return found[0]


def chip_share(device: jax.Device) -> float:
    """The share of a chip that a device of jax is: a core of two, or all of it.

    Devices of unknown kinds count as a chip each.
    """
    chip = _chip(device)
    if chip is None:
        return 1.0
    return getattr(device, "num_cores", chip.cores_of_device) / chip.cores


def device_figures(device: jax.Device) -> Chip | None:
    """Peak figures of one device of jax, None if its kind is not in the table."""
    chip = _chip(device)
    return chip and chip * chip_share(device)


def _chip(device: jax.Device) -> Chip | None:
    """The whole chip of a device, None if its kind is not in the table."""
    kinds = (kind for kind in _CHIPS if device.device_kind.startswith(kind))
    return _CHIPS.get(next(kinds, ""))


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak of one device in FLOP/s, None if it is not in the table."""
    figures = device_figures(device)
    return figures.peak_flops if figures else None
