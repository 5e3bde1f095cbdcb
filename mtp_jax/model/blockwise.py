"""Causal attention for a CPU: blocks of queries, each with only the keys it may read.

Axes: B rows, T positions (queries), S keys, H query heads, G key-value heads, K head
width; of a block, Q the queries of all heads of a group, one head under the other.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from mtp_jax.model.kernels import causal_mask

# Four blocks leave out three eighths of the keys; more would save little, and each is a
# piece of program to compile.
_MOST_BLOCKS = 4
_SMALLEST = 64  # queries, or products become too small

_as_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def blockwise(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array,
    window: int = 0,
) -> jax.Array:
    """Softmax attention within documents, of whole rows.

    Scores and softmax are in float32, the products in the compute dtype.

    Returns:
      [B, T, H, K], in the dtype of the queries.
    """
    b, t, h, k = q_BTHK.shape
    g = k_BTGK.shape[2]
    mask_BTS = causal_mask(segments_BT, t, 0, window)
    scaled = (q_BTHK * k**-0.5).reshape(b, t, g, h // g, k)
    q_BGRTK = jnp.transpose(scaled, (0, 2, 3, 1, 4))
    k_BGSK, v_BGSK = (jnp.swapaxes(x, 1, 2) for x in (k_BTGK, v_BTGK))
    found = []
    for begin, end in _blocks(t):
        first = max(0, begin - window + 1) if window else 0
        q_BGQK = q_BGRTK[:, :, :, begin:end].reshape(b, g, -1, k)
        keys = slice(first, end)
        read_BGQK = _read(
            q_BGQK,
            k_BGSK[:, :, keys],
            v_BGSK[:, :, keys],
            mask_BTS[:, begin:end, keys],
        )
        found.append(read_BGQK.reshape(b, g, h // g, end - begin, k))
    out_BGRTK = jnp.concatenate(found, axis=3).astype(q_BTHK.dtype)
    return jnp.transpose(out_BGRTK, (0, 3, 1, 2, 4)).reshape(b, t, h, k)


def _blocks(t: int) -> list[tuple[int, int]]:
    """Beginning and end of blocks of t queries, of nearly one size."""
    count = max(1, min(_MOST_BLOCKS, t // _SMALLEST))
    return list(itertools.pairwise(t * i // count for i in range(count + 1)))


@jax.custom_vjp
def _read(
    q_BGQK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """Attention of queries to a block's keys, float32 [B, G, Q, K].

    Its backward pass keeps the weights before they are divided by their sum, makes no
    further sum over keys, and multiplies so that XLA's products on a CPU are fast ones.
    """
    return _read_forward(q_BGQK, k_BGSK, v_BGSK, mask_BTS)[0]


def _read_forward(q_BGQK, k_BGSK, v_BGSK, mask_BTS):
    b, t, s = mask_BTS.shape
    scores = _as_float32("bgqk,bgsk->bgqs", q_BGQK, k_BGSK)
    by_head = scores.reshape(b, scores.shape[1], -1, t, s)
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask_BTS[:, None, None], by_head, lowest).reshape(scores.shape)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total_BGQ1 = jnp.sum(weights, axis=-1, keepdims=True)
    weights_BGQS = weights.astype(v_BGSK.dtype)
    out_BGQK = _as_float32("bgqs,bgsk->bgqk", weights_BGQS, v_BGSK) / total_BGQ1
    return out_BGQK, (q_BGQK, k_BGSK, v_BGSK, weights_BGQS, total_BGQ1, out_BGQK)


def _read_backward(kept, d_out_BGQK):
    q_BGQK, k_BGSK, v_BGSK, weights_BGQS, total_BGQ1, out_BGQK = kept
    dtype = q_BGQK.dtype
    scaled_BGQK = d_out_BGQK / total_BGQ1
    mean_BGQ1 = jnp.sum(scaled_BGQK * out_BGQK, axis=-1, keepdims=True)
    scaled_BGQK = scaled_BGQK.astype(dtype)
    d_weights_BGQS = _as_float32("bgqk,bgsk->bgqs", scaled_BGQK, v_BGSK)
    d_scores_BGQS = (weights_BGQS * (d_weights_BGQS - mean_BGQ1)).astype(dtype)
    d_q_BGQK = _as_float32("bgqs,bgsk->bgqk", d_scores_BGQS, k_BGSK)
    d_k_BGKS = _as_float32("bgqk,bgqs->bgks", q_BGQK, d_scores_BGQS)
    d_v_BGKS = _as_float32("bgqk,bgqs->bgks", scaled_BGQK, weights_BGQS)
    d_k_BGSK, d_v_BGSK = (jnp.swapaxes(x, 2, 3) for x in (d_k_BGKS, d_v_BGKS))
    return *(x.astype(dtype) for x in (d_q_BGQK, d_k_BGSK, d_v_BGSK)), None


_read.defvjp(_read_forward, _read_backward)
