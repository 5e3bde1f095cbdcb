"""Attention of new tokens over the KV cache.

Axes: B batch, W new tokens, S slots of the cache, H query heads, G key-value heads, K
head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode.cpu.backend import backend_for
from mtp_jax.model import kernels
from mtp_jax.parallel.sharding import spec


def cached_attention(
    q_BWHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    start_B: jax.Array,
    ancestors_WW: np.ndarray | None,
    window: int = 0,
) -> jax.Array:
    """New tokens read the cache: what was there before them, and their ancestors.

    Args:
      q_BWHK: queries of the new tokens, the w-th of which is in slot start + w.
      k_BGSK, v_BGSK: the cache with them; slots after heads.
      start_B: slot of the first new token.
      ancestors_WW: [w, u] is true if w is u or descends from it; None: a chain.
      window: positions that a token reads at most, itself the last; 0: all before it.

    Returns:
      [B, W, H, K], in the dtype of the queries.
    """
    backend = backend_for(q_BWHK.dtype)

    def local(q_BWHK, k_BGSK, v_BGSK, start_B):
        if backend is not None:
            read = backend.attention(
                q_BWHK, k_BGSK, v_BGSK, start_B, ancestors_WW, window
            )
            if read is not None:
                return read
        offset_BS = jnp.arange(k_BGSK.shape[2])[None] - start_B[:, None]
        mask_BWS = _seen(offset_BS, q_BWHK.shape[1], ancestors_WW, window)
        # The kernel has slots before heads; swapping them twice costs nothing.
        k_BSGK, v_BSGK = (jnp.swapaxes(x, 1, 2) for x in (k_BGSK, v_BGSK))
        return kernels.xla(q_BWHK, k_BSGK, v_BSGK, mask_BWS)

    by_head = spec("batch", None, "heads", None)
    store = spec("batch", "heads", None, None)
    return jax.shard_map(
        local,
        in_specs=(by_head, store, store, spec("batch")),
        out_specs=by_head,
        check_vma=backend is None,  # nothing is known of a kernel of ours
    )(q_BWHK, k_BGSK, v_BGSK, start_B)


def _seen(
    offset_BS: jax.Array, news: int, ancestors_WW: np.ndarray | None, window: int
) -> jax.Array:
    """True where a new token reads a slot, bool [B, W, S].

    Args:
      offset_BS: of each slot from that of the first new token.
      news: W.
      ancestors_WW, window: as for `cached_attention`.
    """
    if ancestors_WW is None:
        # In a chain slots are positions.
        apart_BWS = jnp.arange(news)[None, :, None] - offset_BS[:, None, :]
        seen_BWS = apart_BWS >= 0
        return seen_BWS & (apart_BWS < window) if window else seen_BWS
    inside_BS = (offset_BS >= 0) & (offset_BS < news)
    own_BS = jnp.clip(offset_BS, 0, news - 1)
    seen_WBS = jnp.asarray(ancestors_WW)[:, own_BS]
    own_BWS = jnp.swapaxes(seen_WBS, 0, 1) & inside_BS[:, None]
    seen_BWS = own_BWS | (offset_BS < 0)[:, None]
    if not window:
        return seen_BWS
    depth_W = jnp.asarray(ancestors_WW.sum(axis=1) - 1)
    place_BS = jnp.where(inside_BS, depth_W[own_BS], offset_BS)
    return seen_BWS & (depth_W[None, :, None] - place_BS[:, None] < window)
