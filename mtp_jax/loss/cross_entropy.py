"""Cross entropy of hidden states against the vocabulary, a chunk of tokens at a time.

Axes: B rows, T positions, D model width, V vocabulary, R groups of devices with tokens
of their own. On one device: b rows, t positions of them, M = b t tokens, C of them in a
chunk, v tokens of the vocabulary, d a device's share of the width.

Where a table is several tables side by side, D is the sum of their widths.

Every device works on its own tokens, so the only collectives are sums over the shards
of the vocabulary: logits never leave the device that made them.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtp_jax.model.layers import unembed
from mtp_jax.parallel.sharding import axes_of, on_one_cpu, spec

# float32 logits of a chunk on a device if the config leaves it open: 512 MiB. Chunks
# that large keep the products efficient; more would only take memory. A CPU's products
# are as efficient with 32 MiB, which its caches serve better.
_LOGITS = 2**27
_LOGITS_OF_CPU = 2**23

TOKENS = spec("batch", "time")
HIDDEN = spec("batch", "time", None)
COPIES = spec("copies", "vocab", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Figures of each token's logits, which are gone themselves. Any leading axes."""

    nll: jax.Array  # negative log likelihood of the target, nats, float32
    log_z: jax.Array  # log-partition, float32
    predicted: jax.Array  # the most likely token, the first of equals, int32
    loss: jax.Array | None = None  # weighted, if it is more than cross entropy
    alpha: jax.Array | None = None  # acceptance of a draft by the teacher, `laws`
    entropy: jax.Array | None = None  # of the law, nats
    # Of the gradient of a head's weighted loss into the trunk, over all tokens: its
    # product with head 1's, and with itself; float32, one number a head.
    with_first: jax.Array | None = None
    squared: jax.Array | None = None


def copy_unembedding(w_VD: jax.Array, dtype: str) -> jax.Array:
    """The output matrix, whole in width in every group of devices: [R, V, D].

    Copies of one matrix, and still an axis: what a group adds up for its copy stays
    there until the gradient of this function adds up the groups.
    """

    def local(w_vd):
        axis = axes_of("embed")
        w_vd = w_vd.astype(dtype)  # gathered in the narrower type
        return lax.all_gather(w_vd, axis, axis=1, tiled=True)[None]

    by_width = spec("vocab", "embed")
    return jax.shard_map(local, in_specs=by_width, out_specs=COPIES)(w_VD)


def score_tokens(
    hidden_BTD: jax.Array, w_RVD: jax.Array, targets_BT: jax.Array, chunk_tokens: int
) -> TokenScores:
    """Scores of every token, differentiable; the backward pass makes the logits again.

    Args:
      hidden_BTD: normed output of a head.
      w_RVD: from `copy_unembedding`; its gradient adds up in the dtype that it has
        here, the products are in that of hidden_BTD.
      targets_BT: token ids.
      chunk_tokens: tokens of a device whose logits live at once; 0: 2^27 logits, on
        a CPU 2^23.

    Returns:
      [B, T] each.
    """

    def local(hidden_btD, w_1vD, targets_bt):
        @jax.checkpoint
        def one_chunk(_, token):
            hidden_CD, target_C = token
            w_vD = w_1vD[0].astype(hidden_CD.dtype)
            logits_Cv = logits_of(hidden_CD, w_vD)
            return None, scores_of(logits_Cv, target_C)

        tokens = (hidden_btD, targets_bt)
        return scan_chunks(one_chunk, None, tokens, w_1vD.shape[1], chunk_tokens)[1]

    in_specs = (HIDDEN, COPIES, TOKENS)
    return jax.shard_map(local, in_specs=in_specs, out_specs=TOKENS)(
        hidden_BTD, w_RVD, targets_BT
    )


def score_tokens_and_grad(
    hidden_BTD: jax.Array,
    w_RVD: jax.Array,
    targets_BT: jax.Array,
    weight_BT: jax.Array,
    z_loss: float,
    chunk_tokens: int,
    widths: tuple[int, ...] = (),
) -> tuple[TokenScores, jax.Array, tuple[jax.Array, ...]]:
    """The scores, and the gradient of sum(weight (nll + z_loss log_z^2)).

    From the logits of one pass: a chunk's are made, used for both, and gone.

    Args:
      hidden_BTD, w_RVD, targets_BT, chunk_tokens: as for `score_tokens`.
      weight_BT: float32; 0 where nothing is to be predicted.
      z_loss: weight of the squared log-partition.
      widths: of the tables that lie side by side in w_RVD; empty: it is one.

    Returns:
      scores, the gradient of hidden_BTD in its dtype, and that of each table, float32
      [V, D], split as the parameter is. It adds up in float32 on each device, and
      crosses the network in the compute dtype.
    """
    widths = widths or (w_RVD.shape[-1],)

    def local(hidden_btD, w_1vD, targets_bt, weight_bt):
        w_vD = w_1vD[0]

        def one_chunk(d_w_vD, token):
            hidden_CD, target_C, weight_C = token
            logits_Cv = logits_of(hidden_CD, w_vD)
            scores = scores_of(logits_Cv, target_C)
            log_z_C1 = scores.log_z[:, None]
            pull_C1 = weight_C[:, None] * (1.0 + 2.0 * z_loss * log_z_C1)
            is_target_Cv = is_token(w_vD.shape[0], target_C)
            d_logits_Cv = jnp.exp(logits_Cv - log_z_C1) * pull_C1
            d_logits_Cv -= jnp.where(is_target_Cv, weight_C[:, None], 0.0)
            # Products in the compute dtype, or they would cost many times more.
            d_logits_Cv = d_logits_Cv.astype(hidden_CD.dtype)
            d_hidden_CD = dot("cv,vd->cd", d_logits_Cv, w_vD)
            d_w_vD += dot("cv,cd->vd", d_logits_Cv, hidden_CD)
            return d_w_vD, (scores, d_hidden_CD.astype(hidden_CD.dtype))

        tokens = (hidden_btD, targets_bt, weight_bt)
        zeros_vD = jnp.zeros_like(w_vD, jnp.float32)
        d_w_vD, (scores, d_hidden_btD) = scan_chunks(
            one_chunk, zeros_vD, tokens, w_vD.shape[0], chunk_tokens
        )
        d_hidden_btD = lax.psum(d_hidden_btD, axes_of("vocab"))
        ends = list(itertools.accumulate(widths))[:-1]
        tables = jnp.split(d_w_vD.astype(w_vD.dtype), ends, axis=1)
        return scores, d_hidden_btD, tuple(map(add_copies, tables))

    by_width = spec("vocab", "embed")
    scores, d_hidden_BTD, d_tables = jax.shard_map(
        local,
        in_specs=(HIDDEN, COPIES, TOKENS, TOKENS),
        out_specs=(TOKENS, HIDDEN, (by_width,) * len(widths)),
    )(hidden_BTD, w_RVD, targets_BT, weight_BT)
    return scores, d_hidden_BTD, tuple(x.astype(jnp.float32) for x in d_tables)


def add_copies(d_w_vD: jax.Array) -> jax.Array:
    """The sum over the groups of devices; each keeps its share of the width.

    Within a `shard_map`, as whatever is below.
    """
    width = axes_of("embed")
    others = tuple(axis for axis in axes_of("copies") if axis not in width)
    d_w_vd = lax.psum_scatter(d_w_vD, width, scatter_dimension=1, tiled=True)
    return lax.psum(d_w_vd, others)


def scan_chunks(
    one_chunk: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    tokens: Any,
    vocab: int,
    chunk_tokens: int,
) -> tuple[Any, Any]:
    """Runs `one_chunk` over the tokens [b, t, ...] of a device, C at a time.

    The chunks are of one size, the smallest at which there are no more of them, so that
    few tokens are added to fill the last.
    """
    b, t = jax.tree.leaves(tokens)[0].shape[:2]
    m = b * t
    logits = _LOGITS_OF_CPU if on_one_cpu() else _LOGITS
    k = -(-m // min(m, chunk_tokens or max(1, logits // vocab)))
    c = -(-m // k)

    def split(x_btX):
        x_MX = x_btX.reshape(m, *x_btX.shape[2:])
        ends = [(0, k * c - m)] + [(0, 0)] * (x_MX.ndim - 1)
        return jnp.pad(x_MX, ends).reshape(k, c, *x_MX.shape[1:])

    def join(x_kCX):
        return x_kCX.reshape(k * c, *x_kCX.shape[2:])[:m].reshape(
            b, t, *x_kCX.shape[2:]
        )

    carry, found = lax.scan(one_chunk, carry, jax.tree.map(split, tokens))
    return carry, jax.tree.map(join, found)


@jax.custom_jvp
def logits_of(hidden_CD: jax.Array, w_vD: jax.Array) -> jax.Array:
    """Scores of the device's share of the vocabulary, float32 [C, v]."""
    return unembed(hidden_CD, w_vD)


@logits_of.defjvp
def _(primals, tangents):
    # The tangent passes through the compute dtype, so that the transposed products take
    # the logits' cotangent in it instead of in float32.
    (hidden_CD, w_vD), (d_hidden_CD, d_w_vD) = primals, tangents
    moved = jnp.einsum("cd,vd->cv", d_hidden_CD, w_vD) + jnp.einsum(
        "cd,vd->cv", hidden_CD, d_w_vD
    )
    return logits_of(hidden_CD, w_vD), moved.astype(jnp.float32)


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product that adds up in float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def is_token(v: int, target_C: jax.Array) -> jax.Array:
    """True at the target of each token, in the device's share of the vocabulary."""
    return _ids(v) == target_C[:, None]


def _ids(v: int) -> jax.Array:
    """Token ids of the device's share of the vocabulary, int32 [1, v]."""
    first = lax.axis_index(axes_of("vocab")) * v
    return (first + jnp.arange(v, dtype=jnp.int32))[None]


def scores_of(logits_Cv: jax.Array, target_C: jax.Array) -> TokenScores:
    """Scores of a chunk, reduced over the shards of the vocabulary; [C] each.

    Comparisons and reductions, no gather and no argmax: they stay on their shards, and
    compilers make vector code of them.
    """
    axis, v = axes_of("vocab"), logits_Cv.shape[1]
    fixed_Cv = lax.stop_gradient(logits_Cv)
    top_C1 = lax.pmax(jnp.max(fixed_Cv, axis=1), axis)[:, None]
    is_target_Cv = is_token(v, target_C)
    sum_C, picked_C = lax.psum(
        (
            jnp.sum(jnp.exp(logits_Cv - top_C1), axis=1),
            jnp.sum(jnp.where(is_target_Cv, logits_Cv, 0.0), axis=1),
        ),
        axis,
    )
    log_z_C = top_C1[:, 0] + jnp.log(sum_C)
    last = v * lax.axis_size(axis) - 1  # predicted where a logit is not a number
    predicted_C = lax.pmin(
        jnp.min(jnp.where(fixed_Cv == top_C1, _ids(v), last), axis=1), axis
    )
    return TokenScores(nll=log_z_C - picked_C, log_z=log_z_C, predicted=predicted_C)
