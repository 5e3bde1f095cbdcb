"""How one CPU stores a model's weights for decoding, and what reads them there.

Two ways: kernels of our own (`native`: float32, where there is a C++ compiler), and
XLA's products in the one form that is fast for a few tokens. Everywhere else, on
accelerators and on several devices, decoding works on plain arrays, and `backend_for`
gives None.

Axes: B batch, W new tokens, S slots of the cache, H query heads, G key-value heads, K
head width, D model width.
"""

import dataclasses
import math
from typing import Protocol

import jax
import numpy as np
from jax.typing import DTypeLike

from mtp_jax.decode.cpu import native
from mtp_jax.decode.cpu.packed_weights import PackedScale, PackedWeight, pack
from mtp_jax.decode.cpu.row_weights import RowWeight
from mtp_jax.parallel.sharding import on_one_cpu


class Backend(Protocol):
    """One way to decode on one CPU."""

    @property
    def copies(self) -> bool:
        """True if `matrix` makes another array of the weights that it is given."""
        ...

    def matrix(self, w: jax.Array, inputs: int) -> PackedWeight | RowWeight:
        """A matrix [*outputs, *inputs] with `inputs` axes of inputs, as it is read."""
        ...

    def scale(self, scale: jax.Array) -> PackedScale | jax.Array:
        """The scale of a norm, as it is read."""
        ...

    def attention(
        self,
        q_BWHK: jax.Array,
        k_BGSK: jax.Array,
        v_BGSK: jax.Array,
        start_B: jax.Array,
        ancestors_WW: np.ndarray | None,
        window: int,
    ) -> jax.Array | None:
        """New tokens read the cache, [B, W, H, K]; None: this backend has no kernel.

        The arguments are those of `cached_attention`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NativeBackend:
    """Kernels in C++ in which a token gives the same bits among any others."""

    copies: bool = True

    def matrix(self, w: jax.Array, inputs: int) -> PackedWeight:
        outputs = w.shape[: w.ndim - inputs]
        return pack(w.reshape(math.prod(outputs), -1), outputs)

    def scale(self, scale: jax.Array) -> PackedScale:
        return PackedScale(scale)

    def attention(self, q_BWHK, k_BGSK, v_BGSK, start_B, ancestors_WW, window):
        return native.attention(q_BWHK, k_BGSK, v_BGSK, start_B, ancestors_WW, window)


@dataclasses.dataclass(frozen=True)
class XlaBackend:
    """XLA's products of few tokens, norms and attention."""

    copies: bool = False

    def matrix(self, w: jax.Array, inputs: int) -> RowWeight:
        del inputs  # what is multiplied with it has as many
        return RowWeight(w)

    def scale(self, scale: jax.Array) -> jax.Array:
        return scale

    def attention(self, q_BWHK, k_BGSK, v_BGSK, start_B, ancestors_WW, window):
        del q_BWHK, k_BGSK, v_BGSK, start_B, ancestors_WW, window
        return None


def backend_for(dtype: DTypeLike) -> Backend | None:
    """The backend for weights of a dtype; None unless the mesh in force is one CPU."""
    if not on_one_cpu():
        return None
    return NativeBackend() if native.serves(dtype) else XlaBackend()
