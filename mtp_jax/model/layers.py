"""The parts of a transformer layer, and stacks of modules.

Axes: B batch, T time, D model width, H query heads, G key-value heads, K head width,
F feed-forward width.

Weights carry no shape suffix, because a stack adds an axis to them. Matrices are named
`w_*`, which is also what decides weight decay.
"""

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from mtp_jax.config import ModelConfig
from mtp_jax.parallel.sharding import axes_of, on_one_cpu, spec, spec_like

M = TypeVar("M", bound=nnx.Module)

# The deviation of a standard normal that is cut at -2 and 2.
_CUT_DEVIATION = 0.87962566


class Projects(Protocol):
    """A matrix that is stored in a form of its own and brings its own product."""

    def project(
        self, x: jax.Array, out: PartitionSpec, dtype: DTypeLike = ...
    ) -> jax.Array:
        """x [B, T, *inputs] times the matrix, [B, T, *outputs], laid out as `out`."""
        ...


class Norms(Protocol):
    """The scale of a norm that brings its own arithmetic."""

    def norm(self, x: jax.Array, eps: float) -> jax.Array:
        """Root-mean-square norm of x, [B, T, *axes of the scale], or of its parts."""
        ...


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    fan_in: int,
    dtype: str,
) -> nnx.Param:
    """A matrix of variance 1 / fan_in, sharded by axes.

    Normal, cut at two deviations of what is cut: no weight is larger than
    2.27 / sqrt(fan_in).
    """
    init = jax.nn.initializers.truncated_normal(stddev=fan_in**-0.5 / _CUT_DEVIATION)
    return nnx.Param(init(rngs.params(), shape, dtype, out_sharding=spec(*axes)))


def stack(make: Callable[[nnx.Rngs], M], n: int, *, rngs: nnx.Rngs) -> M:
    """n independent copies of a module as one, its parameters stacked on axis 0."""
    return jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), n))


def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """Rows of the embedding table, [B, T, D] in `dtype`.

    The table stays where it is, split in both axes: the devices that share its width
    look each other's tokens up and exchange what they found. That is less to move than
    the table, and the gradient adds up in the table's own shards and dtype.
    """
    width, vocab = axes_of("embed"), axes_of("vocab")
    rows = spec_like(tokens_BT)
    # Where time is whole, devices that differ along its axis have the same tokens.
    same = () if rows[1] else axes_of("time")
    own = tuple(axis for axis in width if axis not in same)

    def local(table_vd, tokens_bt):
        tokens_BT = lax.all_gather(tokens_bt, own, axis=0, tiled=True)
        v = table_vd.shape[0]
        slots_BT = tokens_BT - lax.axis_index(vocab) * v
        here_BT1 = ((slots_BT >= 0) & (slots_BT < v))[:, :, None]
        found_BTd = table_vd[jnp.clip(slots_BT, 0, v - 1)]
        found_BTd = jnp.where(here_BT1, found_BTd, 0).astype(dtype)
        if same and lax.axis_size(same) > 1:
            found_BTd = lax.psum(found_BTd, vocab)
            found_BTd = lax.all_gather(
                found_BTd, same, axis=2, tiled=True, to="invarying"
            )
        else:
            found_BTd = lax.psum(found_BTd, vocab + same)
        return lax.all_to_all(found_BTd, own, split_axis=0, concat_axis=2, tiled=True)

    in_specs = (spec("vocab", "embed"), rows)
    out_specs = spec_like(tokens_BT, None)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs)(
        table_VD, tokens_BT
    )


def rms_norm(x: jax.Array, scale: jax.Array | Norms, eps: float) -> jax.Array:
    """Root-mean-square norm over the axes of the scale, the last ones of x.

    arXiv:1910.07467, equation 4. Normalised in float32, returned in the dtype of x:
    [..., D] -> [..., D].
    """
    if not isinstance(scale, jax.Array):
        return scale.norm(x, eps)
    x32 = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
    normed = (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)
    ones = (1,) * (x.ndim - scale.ndim)
    return normed * scale.astype(x.dtype).reshape(ones + scale.shape)


def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str):
    """A bias of zeros, sharded by axes."""
    return nnx.Param(jnp.zeros(shape, dtype, out_sharding=spec(*axes)))


def biased(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """x [..., *axes of the bias] with the bias added, in the dtype of x."""
    if bias is None:
        return x
    value = bias.get_value().astype(x.dtype)
    return x + value.reshape((1,) * (x.ndim - value.ndim) + value.shape)


class MLP(nnx.Module):
    """Gated feed-forward layer (SwiGLU, arXiv:2002.05202, equation 6)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        d, f, dtype = cfg.d_model, cfg.d_ff, cfg.param_dtype
        self.w_gate = weight(rngs, (d, f), ("embed", "ff"), fan_in=d, dtype=dtype)
        self.w_up = weight(rngs, (d, f), ("embed", "ff"), fan_in=d, dtype=dtype)
        self.w_down = weight(rngs, (f, d), ("ff", "embed"), fan_in=f, dtype=dtype)
        has_bias = cfg.layer.mlp_bias
        self.bias_gate = zeros((f,), ("ff",), dtype) if has_bias else None
        self.bias_up = zeros((f,), ("ff",), dtype) if has_bias else None
        self.bias_down = zeros((d,), (None,), dtype) if has_bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        outer = spec_like(x_BTD, None)
        out_BTD = project("btf,fd->btd", self.inner(x_BTD), self.w_down, outer)
        return biased(out_BTD, self.bias_down)

    def inner(self, x_BTD: jax.Array) -> jax.Array:
        """The hidden layer, which `w_down` multiplies, [B, T, F]."""
        inner = spec_like(x_BTD, "ff")
        gate_BTF = project("btd,df->btf", x_BTD, self.w_gate, inner)
        up_BTF = project("btd,df->btf", x_BTD, self.w_up, inner)
        gate_BTF = jax.nn.silu(biased(gate_BTF, self.bias_gate))
        return gate_BTF * biased(up_BTF, self.bias_up)


def unstack(stacked: M) -> list[M]:
    """The modules of a stack, one by one.

    Their gradients are joined once, however many there are.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    count = len(leaves[0])
    split = [lax.split(leaf, (1,) * count) for leaf in leaves]
    return [
        jax.tree.unflatten(treedef, [lax.squeeze(parts[i], (0,)) for parts in split])
        for i in range(count)
    ]


def project(equation: str, x: jax.Array, w: nnx.Param, out: PartitionSpec) -> jax.Array:
    """einsum of activations with a weight cast to their dtype, laid out as `out`."""
    value: jax.Array | Projects = w.get_value()
    if not isinstance(value, jax.Array):
        return value.project(x, out)
    value = value.astype(x.dtype)
    if on_one_cpu():
        return _flat_product(x, value, out)
    return jnp.einsum(equation, x, value, out_sharding=out)


def _flat_product(x: jax.Array, w: jax.Array, out: PartitionSpec) -> jax.Array:
    """The einsum of `project` as a product of two matrices.

    A CPU has fast products of matrices only, not of what has more axes.
    """
    b, t, *inputs = x.shape
    count = len(inputs)
    outputs = w.shape[count:]
    flat = PartitionSpec(None, None)
    x_MI = jnp.reshape(x, (b * t, -1), out_sharding=flat)
    w_IO = jnp.reshape(w, (math.prod(inputs), -1), out_sharding=flat)
    return jnp.reshape(x_MI @ w_IO, (b, t, *outputs), out_sharding=out)


def unembed(
    x: jax.Array, w_VD: jax.Array | Projects, out: PartitionSpec | None = None
) -> jax.Array:
    """Logits of normed hidden states x [..., D], float32 [..., V], laid out as `out`.

    The one definition of logits: training, evaluation and decoding call it.
    """
    if not isinstance(w_VD, jax.Array):
        assert out is not None
        return w_VD.project(x, out, jnp.float32)
    return jnp.einsum(
        "...d,vd->...v", x, w_VD, out_sharding=out, preferred_element_type=jnp.float32
    )
