"""Parameters as the kernels of `native` take them: matrices in panels, scales of norms.

A matrix is stored in panels of a few outputs, each [inputs, outputs]: a forward pass of
decoding costs what reading the weights does, and they are read in the order in which
they lie.

Axes: B batch, T time, I inputs, O outputs, P panels, J outputs of a panel, D model
width.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtp_jax.decode.cpu import native


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A matrix; the outputs that are missing in the last panel are zeros."""

    w_PIJ: jax.Array  # float32
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def project(self, x: jax.Array, out: jax.sharding.PartitionSpec) -> jax.Array:
        """x [B, T, *inputs] times the matrix, float32 [B, T, *outputs], as `out`."""

        def local(x, w_PIJ):
            x_MI = x.reshape(-1, w_PIJ.shape[1])
            y_MO = native.product(x_MI, w_PIJ)[:, : math.prod(self.outputs)]
            return y_MO.reshape(*x.shape[:2], *self.outputs)

        return _on_the_device(local, x, self.w_PIJ, out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedScale:
    """The scale of a norm."""

    scale_D: jax.Array  # float32

    def norm(self, x_BTD: jax.Array, eps: float) -> jax.Array:
        """Root-mean-square norm of x, float32 [B, T, D]."""

        def local(x_BTD, scale_D):
            x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
            return native.rms_norm(x_MD, scale_D, eps).reshape(x_BTD.shape)

        rows = jax.typeof(x_BTD).sharding.spec
        return _on_the_device(local, x_BTD, self.scale_D, rows)


def pack(w_OI: jax.Array, outputs: tuple[int, ...]) -> PackedWeight:
    """A matrix [O, I] in panels; O are the `outputs`, as one axis."""
    width = native.width()
    panels = -(-w_OI.shape[0] // width)
    whole_OI = jnp.pad(w_OI, ((0, panels * width - w_OI.shape[0]), (0, 0)))
    w_PJI = whole_OI.reshape(panels, width, w_OI.shape[1])
    return PackedWeight(jnp.swapaxes(w_PJI, 1, 2), outputs)


def _on_the_device(
    kernel: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    w: jax.Array,
    out: jax.sharding.PartitionSpec,
) -> jax.Array:
    """kernel(x, w), laid out as `out`; with one device, specs only name what is so."""
    in_specs = (jax.typeof(x).sharding.spec, jax.typeof(w).sharding.spec)
    call = jax.shard_map(kernel, in_specs=in_specs, out_specs=out, check_vma=False)
    return call(x, w)
