"""The bias by the token before, from embeddings: what a vector says of what follows.

Most pairs of a large vocabulary never occur in the text of a fit, and counts say
nothing of them; but tokens have vectors. So head i at t gets what its own map A_i makes
of its features f, and what one more map B, of all heads, makes of the embedding e of
the token at t + i - 1, fitted together:

    min sum_i |A_i^T f_t + B^T e_i - y_i|^2 + a ridge,

with y_i the normed state of head 1 at t + i - 1. Each A_i is solved for first, as a
function of B. The bias of a token with embedding e is then U (s * B^T e), with U the
unembedding and s the scale of head 1's norm. Its rank is D; what is kept of it are the
largest singular values of the table of all tokens, rows weighed by the square roots of
their counts (arXiv:2606.12370 has the bias; that a regression begins it is our own).

Axes: B rows, T positions, D model width, V vocabulary, r rank, Z = 2 D features.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.growth.forward import Pass, unit
from mtp_jax.growth.ridge import solve, summed
from mtp_jax.growth.text import FitText
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.processes import of_first

Tree = Any
_ROUNDING = 1e-6  # of float32 sums, to their largest eigenvalue


def fit_token_map(
    cfg: ModelConfig, params: Tree, text: FitText, first: int
) -> np.ndarray:
    """B, float64 [D, D], for heads from number `first` on, counted from 0."""
    heads = range(first, cfg.n_future_tokens)
    add = _adder(cfg, tuple(heads))
    return np.asarray(of_first(solve_token_map(*summed(add, params, text))))


def solve_token_map(gram_NZZ: np.ndarray, cross_NZD: np.ndarray) -> np.ndarray:
    """B of the least squares of N heads, float64 [D, D].

    Args:
      gram_NZZ: sums of z z^T, with z = [f; e], of each head.
      cross_NZD: sums of z y^T.
    """
    d = gram_NZZ.shape[1] // 2
    left_DD, right_DD = np.zeros((d, d)), np.zeros((d, d))
    for gram_ZZ, cross_ZD in zip(gram_NZZ, cross_NZD, strict=True):
        of_both = gram_ZZ[:d, d:]
        solved = solve(gram_ZZ[:d, :d], of_both)
        left_DD += gram_ZZ[d:, d:] - of_both.T @ solved
        right_DD += cross_ZD[d:] - solved.T @ cross_ZD[:d]
    return solve(left_DD, right_DD)


def bias_of_map(
    cfg: ModelConfig, params: Tree, token_map_DD: np.ndarray, count_V: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """w_markov_in and w_markov_out, float32 [V, r], whose product is next to B's bias.

    Args:
      cfg: the model.
      params: of it, on the mesh that is set.
      token_map_DD: B.
      count_V: how often each token occurs.
    """
    rank, d = cfg.heads.markov_rank, cfg.d_model
    embedding_VD, unembedding_VD = _tables(cfg, params)
    scale_D = np.asarray(jax.device_get(params["norm"]), np.float64).reshape(-1, d)[0]
    weight_V = jnp.asarray(count_V + 1.0, jnp.float32)
    tokens_DD = _gram(embedding_VD, weight_V)
    outputs_DD = _gram(unembedding_VD, jnp.ones_like(weight_V))
    # The table E B s U^T has the singular values of E B s L, with L L^T = U^T U.
    root_DD, back_DD = _roots(outputs_DD)
    into_DD = token_map_DD * scale_D @ root_DD
    _, axes_DD = np.linalg.eigh(into_DD.T @ tokens_DD @ into_DD)
    axes_Dr = np.pad(axes_DD[:, ::-1][:, :rank], [(0, 0), (0, max(rank - d, 0))])
    in_Dr, out_Dr = of_first((into_DD @ axes_Dr, back_DD @ axes_Dr))
    share = np.sqrt(np.linalg.norm(out_Dr) / (np.linalg.norm(in_Dr) + 1e-30))
    w_in = _times(embedding_VD, in_Dr * share)
    w_out = _times(unembedding_VD, out_Dr / share)
    silent_1r = ~np.any(out_Dr, axis=0, keepdims=True)
    if silent_1r.any():  # so that these can still learn
        rest = 0.02 * jax.random.normal(jax.random.key(0), w_in.shape) * silent_1r
        w_in += jax.sharding.reshard(rest, jax.typeof(w_in).sharding.spec)
    return w_in, w_out


def _adder(cfg: ModelConfig, heads: tuple[int, ...]) -> Callable[[Tree, dict], Any]:
    """`f(params, batch) -> ([N, Z, Z], [N, Z, D])`, float32 sums of a batch."""
    _, build = model_builder(cfg)
    product = functools.partial(
        jnp.einsum, precision="highest", out_sharding=jax.P(None, None)
    )

    @jax.jit
    def add(params: Tree, batch: dict[str, jax.Array]):
        run = Pass.over(build(params), {k: x[0] for k, x in batch.items()})
        f_BTD = unit(run.trunk_BTD, cfg.norm_eps)
        grams, crosses = [], []
        for head in heads:
            said_BTD, known_BT = run.said_later(head)
            z_BTZ = jnp.concatenate([f_BTD, run.token_before(head)], axis=-1)
            weighed_BTZ = z_BTZ * known_BT[:, :, None]
            grams.append(product("btx,bty->xy", weighed_BTZ, z_BTZ))
            crosses.append(product("btx,btd->xd", weighed_BTZ, said_BTD))
        return jnp.stack(grams), jnp.stack(crosses)

    return add


def _tables(cfg: ModelConfig, params: Tree) -> tuple[jax.Array, jax.Array]:
    """The embedding, and the unembedding of head 1, [V, D]."""
    embedding_VD = params["w_embedding"]
    if cfg.tie_embeddings:
        return embedding_VD, embedding_VD
    table = params["w_unembedding"]
    return embedding_VD, table[0] if cfg.heads.unembedding == "own" else table


@jax.jit
def _sums(table_VD: jax.Array, weight_V: jax.Array) -> jax.Array:
    vocab = jax.typeof(table_VD).sharding.spec[0]
    rows_VD = jax.sharding.reshard(table_VD.astype(jnp.float32), jax.P(vocab, None))
    weighted_VD = rows_VD * jax.sharding.reshard(weight_V, jax.P(vocab))[:, None]
    whole = jax.P(None, None)
    return jnp.einsum(
        "vd,ve->de", weighted_VD, rows_VD, precision="highest", out_sharding=whole
    )


def _gram(table_VD: jax.Array, weight_V: jax.Array) -> np.ndarray:
    """The sum over tokens of their rows' outer squares, weighed, float64 [D, D]."""
    return np.asarray(jax.device_get(_sums(table_VD, weight_V)), np.float64)


def _roots(gram_DD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L with L L^T = G, and its inverse, transposed; both 0 where G is none.

    A vocabulary smaller than the width leaves G singular, but for rounding.
    """
    size_D, axes_DD = np.linalg.eigh(gram_DD)
    there_D = size_D > _ROUNDING * size_D[-1]
    root_D = np.sqrt(np.where(there_D, size_D, 1.0))
    return axes_DD * (root_D * there_D), axes_DD * (there_D / root_D)


def _times(table_VD: jax.Array, w_Dr: np.ndarray) -> jax.Array:
    """A table times a matrix, float32 [V, r]."""
    w = jnp.asarray(w_Dr, jnp.float32)
    vocab = jax.typeof(table_VD).sharding.spec[0]
    return jnp.einsum(
        "vd,dr->vr", table_VD.astype(jnp.float32), w, precision="highest",
        out_sharding=jax.P(vocab, None),
    )  # fmt: skip
