"""The attention kernels: what each computes, and what it cannot take.

Axes: B rows, T positions (queries), S keys, H query heads, G key-value heads, K head
width.

A kernel runs on one device, over that device's rows and heads. The query head h reads
the key-value head h // (H / G) (arXiv:2305.13245), and no kernel repeats the keys.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

from mtp_jax.config import Attention

# What a kernel keeps for its backward pass goes by this name in checkpoint policies.
KEPT = "attention"

_LANES = 128  # of a TPU's vector registers: splash takes positions by so many


def why_not(
    kernel: Attention,
    device: jax.sharding.AbstractDevice | None,
    *,
    seq_len: int,
    d_head: int,
    dtype: str,
) -> str:
    """What a kernel asks for that is not so; empty if it can run.

    Args:
      kernel: the one in question; "auto" and "xla" ask for nothing.
      device: of the mesh; None if it is not known, and then no kernel can run.
      seq_len: positions of a row.
      d_head: width of an attention head.
      dtype: of queries, keys and values.
    """
    platform, kind = (device.platform, device.device_kind) if device else ("", "")
    if kernel == "splash":
        if platform != "tpu":
            return f"runs on TPUs, and the devices here are of kind {kind!r}"
        if seq_len % _LANES:
            return (
                f"takes rows of a multiple of {_LANES} positions, and "
                f"config.data.seq_len is {seq_len}"
            )
    if kernel == "cudnn":
        # AMD's devices are of platform gpu too, but not of a kind with this name.
        if platform not in ("gpu", "cuda") or not kind.startswith("NVIDIA"):
            return f"runs on NVIDIA GPUs, and the devices here are of kind {kind!r}"
        if dtype != "bfloat16":
            return f"takes bfloat16, and config.model.compute_dtype is {dtype}"
        if d_head % 8 or d_head > 128:
            return (
                "takes head widths up to 128 that are a multiple of 8, and "
                f"config.model.d_head is {d_head}"
            )
        if seq_len % 2:
            return (
                "takes rows of an even number of positions, and config.data.seq_len "
                f"is {seq_len}"
            )
    return ""


def splash(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within documents by the splash kernel, for TPUs.

    Blocks of keys that come after a block of queries are never computed. `interpret`
    runs the kernel's program on any device, slowly.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    t, h = q_BTHK.shape[1:3]
    # The largest block up to 512 that divides the row: fewer steps than small ones, and
    # the float32 scores of a block still fit in the memory of the core.
    block = max(b for b in range(_LANES, 512 + 1, _LANES) if t % b == 0)
    sizes = splash_lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        # A kernel for queries and another for keys and values. The fused one keeps the
        # gradients of the queries once for every block of keys, rounded to bfloat16.
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash_lib.MultiHeadMask([splash_lib.CausalMask((t, t))] * h)
    kernel = splash_lib.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )

    def row(q_THK, k_TGK, v_TGK, segments_T):
        q_HTK, k_GTK, v_GTK = (jnp.swapaxes(x, 0, 1) for x in (q_THK, k_TGK, v_TGK))
        scaled_HTK = q_HTK * q_HTK.shape[-1] ** -0.5  # the kernel does not scale
        segments = splash_lib.SegmentIds(segments_T, segments_T)
        return jnp.swapaxes(kernel(scaled_HTK, k_GTK, v_GTK, segments), 0, 1)

    return jax.vmap(row)(q_BTHK, k_BTGK, v_BTGK, segments_BT)


def cudnn(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Causal attention within documents by cuDNN's flash kernel, for NVIDIA GPUs.

    The documents are a mask [B, 1, T, T] in the dtype of the queries, the only form in
    which cuDNN takes them on every GPU; scores and weights are never stored.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BTGK,
        v_BTGK,
        mask=same_BTT[:, None],
        is_causal=True,
        implementation="cudnn",
    )


def xla(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Softmax attention in plain matrix products, for any device, shape and mask.

    Scores and softmax are in float32, the products in the compute dtype. The queries of
    a group lie one under the other, so that a product takes all of them.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    b, t, h, k = q_BTHK.shape
    s, g = k_BSGK.shape[1:3]
    scaled = (q_BTHK * k**-0.5).reshape(b, t, g, h // g, k)
    q_BGRTK = jnp.transpose(scaled, (0, 2, 3, 1, 4))
    k_BGSK, v_BGSK = (jnp.swapaxes(x, 1, 2) for x in (k_BSGK, v_BSGK))
    scores = jnp.einsum(
        "bgqk,bgsk->bgqs",
        q_BGRTK.reshape(b, g, h // g * t, k),
        k_BGSK,
        preferred_element_type=jnp.float32,
    ).reshape(b, g, h // g, t, s)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    read = jnp.einsum(
        "bgqs,bgsk->bgqk",
        weights.astype(v_BSGK.dtype).reshape(b, g, h // g * t, s),
        v_BGSK,
        preferred_element_type=jnp.float32,
    ).reshape(b, g, h // g, t, k)
    out_BGRTK = (read / total).astype(q_BTHK.dtype)
    return jnp.transpose(out_BGRTK, (0, 3, 1, 2, 4)).reshape(b, t, h, k)
