"""Matrices stored by outputs, for XLA's products of a few tokens on a CPU.

Axes: B batch, T time, M tokens, I inputs, O outputs.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from mtp_jax.decode.cpu.on_device import on_the_device

_FEW_TOKENS = 256  # up to which the product below is the faster one
_WHOLE = (1, 2, 3, 4, 8, 16)  # tokens that it takes; then multiples of 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowWeight:
    """A matrix whose inputs are the last axes: what makes one output lies together."""

    w: jax.Array  # [*outputs, *inputs]

    def project(
        self,
        x: jax.Array,
        out: jax.sharding.PartitionSpec,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """x [B, T, *inputs] times the matrix, [B, T, *outputs] in `dtype` or theirs.

        The product of few tokens is in the one form in which XLA reads the weights
        where they lie; in the others it copies them first.
        """
        tokens, inputs = math.prod(x.shape[:2]), x.ndim - 2
        outputs, width = self.w.ndim - inputs, math.prod(x.shape[2:])
        if tokens > _FEW_TOKENS:
            summed = (tuple(range(2, x.ndim)), tuple(range(outputs, self.w.ndim)))
            return lax.dot_general(
                x, self.w, (summed, ((), ())),
                preferred_element_type=dtype, out_sharding=out,
            )  # fmt: skip

        def local(x, w):
            x_MI, w_OI = x.reshape(tokens, width), w.reshape(-1, width)
            y_MO = product_by_xla(x_MI, w_OI, dtype)
            return y_MO.reshape(*x.shape[:2], *w.shape[:outputs])

        return on_the_device(local, x, self.w, out)


def product_by_xla(
    x_MI: jax.Array, w_OI: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
    """x times w transposed, [M, O] in `dtype` or theirs, for M tokens on one CPU.

    Tokens are filled up to a number that makes whole vectors: 5 would take longer than
    8, 12 than 16.
    """
    tokens = x_MI.shape[0]
    whole = next((m for m in _WHOLE if tokens <= m), -(-tokens // 8) * 8)
    y_OM = lax.dot_general(
        w_OI,
        jnp.pad(x_MI, ((0, whole - tokens), (0, 0))),
        (((1,), (1,)), ((), ())),
        preferred_element_type=dtype,
    )
    # Without the barrier XLA would turn the product round again.
    return lax.optimization_barrier(y_OM)[:, :tokens].T
