"""Parameters packed for the kernels of `native`: matrices in panels, scales of norms.

A matrix is stored in panels of a few outputs, each [inputs, outputs]: a forward pass of
decoding costs what reading the weights does, and they are read in the order in which
they lie.

Axes: B batch, T time, I inputs, O outputs, P panels, J outputs of a panel, D model
width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mtp_jax.decode.cpu import native
from mtp_jax.decode.cpu.on_device import on_the_device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A matrix in panels; the outputs that are missing in the last one are zeros."""

    w_PIJ: jax.Array  # float32
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def project(
        self,
        x: jax.Array,
        out: jax.sharding.PartitionSpec,
        dtype: DTypeLike = jnp.float32,
    ) -> jax.Array:
        """x [B, T, *inputs] times the matrix, float32 [B, T, *outputs], as `out`."""
        assert dtype == jnp.float32, dtype

        def local(x, w_PIJ):
            x_MI = x.reshape(-1, w_PIJ.shape[1])
            y_MO = native.product(x_MI, w_PIJ)[:, : math.prod(self.outputs)]
            return y_MO.reshape(*x.shape[:2], *self.outputs)

        return on_the_device(local, x, self.w_PIJ, out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedScale:
    """The scale of a norm that a kernel of `native` carries out."""

    scale: jax.Array  # float32

    def norm(self, x: jax.Array, eps: float) -> jax.Array:
        """Root-mean-square norm over the axes of the scale, float32 as x."""

        def local(x, scale):
            x_MD = x.reshape(-1, scale.size)
            return native.rms_norm(x_MD, scale.reshape(-1), eps).reshape(x.shape)

        rows = jax.typeof(x).sharding.spec
        return on_the_device(local, x, self.scale, rows)


def pack(w_OI: jax.Array, outputs: tuple[int, ...]) -> PackedWeight:
    """A matrix [O, I] in panels; O are the `outputs`, as one axis."""
    width = native.width()
    panels = -(-w_OI.shape[0] // width)
    whole_OI = jnp.pad(w_OI, ((0, panels * width - w_OI.shape[0]), (0, 0)))
    w_PJI = whole_OI.reshape(panels, width, w_OI.shape[1])
    return PackedWeight(jnp.swapaxes(w_PJI, 1, 2), outputs)
