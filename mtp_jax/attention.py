"""Attention: two functions behind which the kernels of each device have their place.

Axes: B batch, T queries, S keys, H query heads, G key-value heads, K head width.

A query head h reads the key-value head h // (H / G) (arXiv:2305.13245). Scores and
softmax are in float32, the products in the compute dtype.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import Attention
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

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """

    def local(q_BTHK, k_BTGK, v_BTGK, segments_BT):
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        return _xla(q_BTHK, k_BTGK, v_BTGK, jnp.tril(same_BTT))

    return _on_each_device(local, spec("batch", None))(
        q_BTHK, k_BTGK, v_BTGK, segments_BT
    )


def cached_attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Each query reads the cache up to its own position.

    Args:
      q_BTHK: queries of the tokens that are being decoded.
      k_BSGK, v_BSGK: the cache; slot s holds the token at position s.
      positions_BT: position of each query.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """

    def local(q_BTHK, k_BSGK, v_BSGK, positions_BT):
        slots_S = jnp.arange(k_BSGK.shape[1])
        mask_BTS = slots_S[None, None, :] <= positions_BT[:, :, None]
        return _xla(q_BTHK, k_BSGK, v_BSGK, mask_BTS)

    return _on_each_device(local, spec("batch", None))(
        q_BTHK, k_BSGK, v_BSGK, positions_BT
    )


def _on_each_device(local, by_row):
    """`local` on every device's own rows and heads.

    No row and no head needs another, so the devices need not talk, and a kernel that
    knows nothing of meshes can stand in for `_xla`.
    """
    return jax.shard_map(
        local, in_specs=(_BY_HEAD, _BY_HEAD, _BY_HEAD, by_row), out_specs=_BY_HEAD
    )


def _xla(q_BTHK, k_BSGK, v_BSGK, mask_BTS):
    """Softmax attention in plain matrix products.

    The queries of a group lie one under the other, so that a product takes all of them
    and the keys are never repeated.
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
