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
    backend = backend_for(q_BWHK.dtype)

    def local(q_BWHK, k_BGSK, v_BGSK, start_B):
        if backend is not None:
            read = backend.attention(q_BWHK, k_BGSK, v_BGSK, start_B, ancestors_WW)
            if read is not None:
                return read
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

    by_head = spec("batch", None, "heads", None)
    store = spec("batch", "heads", None, None)
    return jax.shard_map(
        local,
        in_specs=(by_head, store, store, spec("batch")),
        out_specs=by_head,
        check_vma=backend is None,  # nothing is known of a kernel of ours
    )(q_BWHK, k_BGSK, v_BGSK, start_B)
