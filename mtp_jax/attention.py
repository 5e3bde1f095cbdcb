"""Attention, and the choice of the kernel that carries it out on every device.

Axes: B batch, T queries, S keys or slots of a cache, W new tokens, H query heads,
G key-value heads, K head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import kernels
from mtp_jax.config import Attention, Config
from mtp_jax.errors import UserError
from mtp_jax.sharding import spec

_BY_HEAD = spec("batch", None, "heads", None)


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array,
    kernel: Attention = "auto",
) -> jax.Array:
    """Each position reads itself and what came before it in its document.

    Args:
      q_BTHK, k_BTGK, v_BTGK: queries, keys and values of packed rows.
      segments_BT: number of the document each position belongs to; padding, 0, is a
        document like any other, so that no query is without a key.
      kernel: which one; `check_attention` says beforehand whether it can.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    if kernel == "auto":
        kernel = _best(q_BTHK)
    local = {"splash": kernels.splash, "cudnn": kernels.cudnn, "xla": _masked}[kernel]
    return _on_each_device(local, kernel)(q_BTHK, k_BTGK, v_BTGK, segments_BT)


def cached_attention(
    q_BWHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    start_B: jax.Array,
    ancestors_WW: np.ndarray | None,
) -> jax.Array:
    """New tokens read the cache: what was there before them, and their ancestors.

    Args:
      q_BWHK: queries of the new tokens, the w-th of which is in slot start + w.
      k_BGSK, v_BGSK: the cache with them; slots after heads.
      start_B: slot of the first new token.
      ancestors_WW: [w, u] is true if w is u or descends from it; None: a chain.

    Returns:
      [B, W, H, K], in the dtype of the queries.
    """

    def local(q_BWHK, k_BGSK, v_BGSK, start_B):
        offset_BS = jnp.arange(k_BGSK.shape[2])[None] - start_B[:, None]
        if ancestors_WW is None:
            w_W = jnp.arange(q_BWHK.shape[1])
            mask_BWS = offset_BS[:, None, :] <= w_W[None, :, None]
        else:
            w = ancestors_WW.shape[0]
            inside_BS = (offset_BS >= 0) & (offset_BS < w)
            seen_WBS = jnp.asarray(ancestors_WW)[:, jnp.clip(offset_BS, 0, w - 1)]
            own_BWS = jnp.swapaxes(seen_WBS, 0, 1) & inside_BS[:, None]
            mask_BWS = own_BWS | (offset_BS < 0)[:, None]
        # The kernel has slots before heads; swapping them twice costs nothing.
        k_BSGK, v_BSGK = (jnp.swapaxes(x, 1, 2) for x in (k_BGSK, v_BGSK))
        return kernels.xla(q_BWHK, k_BSGK, v_BSGK, mask_BWS)

    store = spec("batch", "heads", None, None)
    return jax.shard_map(
        local,
        in_specs=(_BY_HEAD, store, store, spec("batch")),
        out_specs=_BY_HEAD,
    )(q_BWHK, k_BGSK, v_BGSK, start_B)


def check_attention(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses a kernel that the devices or the shapes of a run rule out.

    Raises:
      UserError: naming the kernel, what it asks for and what there is.
    """
    kernel = cfg.compute.attention
    reason = kernels.why_not(
        kernel,
        mesh.abstract_mesh.abstract_device,
        seq_len=cfg.data.seq_len,
        d_head=cfg.model.d_head,
        dtype=cfg.model.compute_dtype,
    )
    if reason:
        raise UserError(
            f"config.compute.attention is {kernel}, which {reason}; with auto, a "
            "kernel that can run is chosen."
        )


def _best(q_BTHK: jax.Array) -> Attention:
    """The kernel for the devices of the mesh in force and for these queries."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    _, t, _, k = q_BTHK.shape
    choices: tuple[Attention, ...] = ("splash", "cudnn")
    for kernel in choices:
        if not kernels.why_not(
            kernel, device, seq_len=t, d_head=k, dtype=q_BTHK.dtype.name
        ):
            return kernel
    return "xla"


def _masked(q_BTHK, k_BTGK, v_BTGK, segments_BT):
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return kernels.xla(q_BTHK, k_BTGK, v_BTGK, jnp.tril(same_BTT))


def _on_each_device(local, kernel: Attention):
    """`local` on every device's own rows and heads.

    No row and no head needs another, so the devices need not talk, and a kernel need
    know nothing of meshes.
    """
    return jax.shard_map(
        local,
        in_specs=(_BY_HEAD, _BY_HEAD, _BY_HEAD, spec("batch", None)),
        out_specs=_BY_HEAD,
        # A Pallas kernel does not say over which axes its results differ. They differ
        # over all that split rows and heads, as the specs say.
        check_vma=kernel != "splash",
    )
