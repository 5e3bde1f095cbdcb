"""The attention kernels: what each computes, and what it cannot take.

Axes: B rows, T positions (queries), S keys, H query heads, G key-value heads, K head
width.

A kernel runs on one device, over that device's rows and heads. The query head h reads
the key-value head h // (H / G) (arXiv:2305.13245), and no kernel repeats the keys.

A window of w lets a query read the last w positions up to its own; 0 is none.

Of a row that is split over devices, a kernel has all keys, in order, and one of S / T
parts of the queries, those that `zigzag` gives to a device.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

from mtp_jax.config import Attention
from mtp_jax.parallel import zigzag

# What a kernel keeps for its backward pass goes by this name in checkpoint policies.
KEPT = "attention"

# cuDNN's time grows with the number of documents that a row may have, so that with more
# than one to so many positions a mask is faster.
_POSITIONS_PER_DOCUMENT = 128

_LANES = 128  # of a TPU's vector registers: splash takes positions by so many


def _step(parts: int) -> int:
    """The number of positions that a row must be a multiple of for splash."""
    return _LANES * len(zigzag.pieces(parts))


def why_not(
    kernel: Attention,
    device: jax.sharding.AbstractDevice | None,
    *,
    seq_len: int,
    shards: int,
    d_head: int,
    dtype: str,
) -> str:
    """The reason why a kernel cannot run, as the end of a sentence; empty if it can.

    Args:
      kernel: the one in question; "auto" and "xla" ask for nothing.
      device: of the mesh; None if it is not known, and then no kernel can run.
      seq_len: positions of a row.
      shards: devices over which they are split.
      d_head: width of an attention head.
      dtype: of queries, keys and values.
    """
    platform, kind = (device.platform, device.device_kind) if device else ("", "")
    if kernel == "splash":
        if platform != "tpu":
            return f"runs on TPUs, and the devices here are of kind {kind!r}"
        if seq_len % _step(shards):
            split = f" with config.mesh.sequence = {shards}" if shards > 1 else ""
            return (
                f"takes rows of a multiple of {_step(shards)} positions{split}, and "
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
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BS: jax.Array,
    part: jax.Array | int,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within documents by the splash kernel, for TPUs.

    Blocks of keys that come after a block of queries are never computed. `interpret`
    runs the kernel's program on any device, slowly.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    t, h = q_BTHK.shape[1:3]
    s = k_BSGK.shape[1]
    parts = s // t
    piece = s // len(zigzag.pieces(parts))
    # The largest block up to 512 that divides the row's pieces: fewer steps than small
    # ones, and the float32 scores of a block still fit in the memory of the core.
    block = max(b for b in range(_LANES, 512 + 1, _LANES) if piece % b == 0)
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
    mask = (
        splash_lib.LocalMask((s, s), (window - 1, 0), 0)
        if window
        else splash_lib.CausalMask((s, s))
    )
    mask.q_sequence = zigzag.positions(s, parts)
    kernel = splash_lib.make_splash_mha(
        splash_lib.MultiHeadMask([mask] * h),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    if parts > 1:
        kernel = _of_part(kernel, part, parts)

    def row(q_THK, k_SGK, v_SGK, segments_T, segments_S):
        q_HTK, k_GSK, v_GSK = (jnp.swapaxes(x, 0, 1) for x in (q_THK, k_SGK, v_SGK))
        scaled_HTK = q_HTK * q_HTK.shape[-1] ** -0.5  # the kernel does not scale
        segments = splash_lib.SegmentIds(segments_T, segments_S)
        return jnp.swapaxes(kernel(scaled_HTK, k_GSK, v_GSK, segments), 0, 1)

    segments_BT, _ = _queries(segments_BS, t, part)
    return jax.vmap(row)(q_BTHK, k_BSGK, v_BSGK, segments_BT, segments_BS)


def _of_part(kernel, part: jax.Array | int, parts: int):
    """The kernel for one part of the queries, from one that was made for all of them.

    Its tables of blocks, [heads, blocks of queries, blocks of keys], say for each part
    what there is to be computed; the positions of the queries are a table [S].
    """

    def own(x: jax.Array) -> jax.Array:
        axis = min(1, x.ndim - 1)
        size = x.shape[axis] // parts
        return lax.dynamic_slice_in_dim(x, part * size, size, axis)

    return jax.tree.map(own, kernel)


def cudnn(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segments_BS: jax.Array,
    part: jax.Array | int,
    window: int = 0,
) -> jax.Array:
    """Causal attention within documents by cuDNN's flash kernel, for NVIDIA GPUs.

    The documents are a mask [B, 1, T, S] in the dtype of the queries, the only form in
    which cuDNN takes any number of them, on every GPU; scores and weights are never
    stored.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    t, s = q_BTHK.shape[1], k_BSGK.shape[1]
    # Told that it is causal, cuDNN leaves out what is hidden. It takes the queries to
    # stand in a line from the first key on, which they do only if the row is whole.
    whole = t == s
    same_BSS = segments_BS[:, :, None] == segments_BS[:, None, :]
    is_all = whole and not window
    mask_BTS = same_BSS if is_all else causal_mask(segments_BS, t, part, window)
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        mask=mask_BTS[:, None],
        is_causal=whole,
        implementation="cudnn",
    )


def cudnn_of_few(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array,
    part: jax.Array | int,
) -> jax.Array:
    """As `cudnn`, for whole rows of at most `most_documents` on GPUs since Hopper.

    cuDNN is told where documents begin, and computes nothing between two of them.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    # The one way to tell cuDNN where documents begin: `jax.nn` has no argument for it.
    # Read here, so that no other device depends on what is not public.
    from jax._src.cudnn import fused_attention_stablehlo

    length_BM, offset_BM1 = document_lengths(segments_BT)
    return fused_attention_stablehlo.dot_product_attention(
        q_BTHK,
        k_BTGK,
        v_BTGK,
        q_seqlen=length_BM,
        kv_seqlen=length_BM,
        q_offsets=offset_BM1,
        kv_offsets=offset_BM1,
        scale=q_BTHK.shape[-1] ** -0.5,
        mask_type=fused_attention_stablehlo.MaskType.PADDING_CAUSAL,
    )


def most_documents(seq_len: int) -> int:
    """The number of documents in a row that `cudnn_of_few` takes at most."""
    return max(2, seq_len // _POSITIONS_PER_DOCUMENT)


def takes_lengths(device: jax.Device) -> bool:
    """Returns True if `cudnn_of_few` runs on a GPU."""
    capability = getattr(device, "compute_capability", None)
    return capability is not None and float(capability) >= 9.0


def document_begins(segments_BT: jax.Array) -> jax.Array:
    """True at the first position of every document, bool [B, T]."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)


def document_lengths(segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The documents of rows as cuDNN takes them, with M = `most_documents`.

    Args:
      segments_BT: number of the document of each position.

    Returns:
      Length of each document [B, M], and where it begins [B, M + 1], int32; -1 where
      there is none.
    """
    t = segments_BT.shape[1]
    m = most_documents(t)
    begin_BM1 = jax.vmap(
        lambda begins_T: jnp.nonzero(begins_T, size=m + 1, fill_value=-1)[0]
    )(document_begins(segments_BT))
    end_BM = jnp.where(begin_BM1[:, 1:] < 0, t, begin_BM1[:, 1:])
    length_BM = jnp.where(begin_BM1[:, :-1] < 0, -1, end_BM - begin_BM1[:, :-1])
    return length_BM.astype(jnp.int32), begin_BM1.astype(jnp.int32)


def causal_mask(
    segments_BS: jax.Array, t: int, part: jax.Array | int, window: int = 0
) -> jax.Array:
    """True where a query of a part reads a key: of its document, and not after it.

    With a window, a key that is fewer positions before it than that.

    Returns:
      bool [B, T, S] for `t` queries.
    """
    segments_BT, positions_T = _queries(segments_BS, t, part)
    same_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
    slots_1S = jnp.arange(segments_BS.shape[1])[None]
    past_TS = slots_1S <= positions_T[:, None]
    if window:
        past_TS &= positions_T[:, None] - slots_1S < window
    return same_BTS & past_TS[None]


def _queries(
    segments_BS: jax.Array, t: int, part: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """The documents [B, T] and the positions [T] of a part's queries."""
    s = segments_BS.shape[1]
    dealt_BS = zigzag.deal(segments_BS, s // t, axis=1)
    positions_S = jnp.asarray(zigzag.positions(s, s // t))
    return (
        lax.dynamic_slice_in_dim(dealt_BS, part * t, t, axis=1),
        lax.dynamic_slice_in_dim(positions_S, part * t, t),
    )


def xla(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    mask_BTS: jax.Array,
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
    q_BGQK = q_BGRTK.reshape(b, g, h // g * t, k)
    k_BGSK, v_BGSK = (jnp.swapaxes(x, 1, 2) for x in (k_BSGK, v_BSGK))
    as_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = as_float32("bgqk,bgsk->bgqs", q_BGQK, k_BGSK)
    scores = scores.reshape(b, g, h // g, t, s)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights_BGQS = weights.astype(v_BSGK.dtype).reshape(b, g, h // g * t, s)
    read = as_float32("bgqs,bgsk->bgqk", weights_BGQS, v_BGSK)
    read = read.reshape(b, g, h // g, t, k)
    out_BGRTK = (read / total).astype(q_BTHK.dtype)
    return jnp.transpose(out_BGRTK, (0, 3, 1, 2, 4)).reshape(b, t, h, k)
