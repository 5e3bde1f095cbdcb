"""Beam search of one prompt within a forward pass; `beam` is the decoder.

Axes: K beams, W nodes of the tree, C continuations of a node, X the best of all beams,
E tokens of a text, F what is kept of each token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtp_jax.decode.decoders.state import ends_text
from mtp_jax.decode.decoders.token_tree import TokenTree

# Arrays of a `DecodeState` that follow a beam when rows are reordered.
KEPT = ("tokens_BE", "forward_BE", "accepted_BE", "deviated_BE")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Search:
    """The beams of a prompt within a forward pass."""

    score_K: jax.Array  # sums of log probabilities; -inf: no beam
    text_KFE: jax.Array  # the arrays of KEPT
    row_K: jax.Array  # the beam before this pass that each comes from
    node_K: jax.Array  # the node that the next token comes after
    last_K: jax.Array  # the node that the last token comes after
    ended_score_K: jax.Array  # of hypotheses, best first; -inf: none
    ended_length_K: jax.Array
    ended_KFE: jax.Array
    length: jax.Array
    done: jax.Array
    active: jax.Array  # whether it advances once more in this pass


def advance_beams(
    search: Search,
    tree: TokenTree,
    length_penalty: float,
    nodes: tuple[jax.Array, ...],
    bounds: tuple[Any, ...],
    forward: jax.Array,
) -> Search:
    """Advances the beams of a prompt by as many tokens as they stay in their trees.

    Args:
      search: all beams at the root of their trees.
      tree: the tree.
      length_penalty: power of the length that scores are over.
      nodes: of each node the log probabilities of its best continuations [K, W, C],
        these tokens, the look-ahead bonus [K, W], and its token [K, W].
      bounds: length of the prompt, the length that ends a text, the tokens that do.
      forward: number of the forward pass.
    """
    first = search.length
    for level in range(tree.depth + 1):
        marks = (forward, level, first)
        new = _level(search, tree, length_penalty, nodes, bounds, marks)
        keep = functools.partial(jnp.where, search.active)
        search = jax.tree.map(keep, new, search)
    return search


def _level(old, tree, length_penalty, nodes, bounds, marks):
    """Makes every beam one token longer."""
    top_KWC, ids_KWC, bonus_KW, tokens_KW = nodes
    start, limit, end_ids = bounds
    forward, level, first = marks
    k, c, e = old.score_K.size, top_KWC.shape[-1], old.text_KFE.shape[-1]
    length = old.length + 1
    norm = (length - start).astype(jnp.float32) ** length_penalty

    here = (old.row_K, old.node_K)
    score_KC = old.score_K[:, None] + top_KWC[here]
    choice_KC = score_KC + bonus_KW[here][:, None]
    # Twice as many as go on, for at most as many may end.
    choice_X, which_X = lax.top_k(choice_KC.reshape(-1), min(2 * k, k * c))
    score_X = score_KC.reshape(-1)[which_X]
    token_X = ids_KWC[here].reshape(-1)[which_X]
    from_X = which_X // c
    deviates_X = (which_X % c > 0).astype(jnp.int32)
    level_X, forward_X = jnp.full_like(token_X, level), jnp.zeros_like(token_X)
    new_XF = [token_X, forward_X + forward, level_X, deviates_X]
    place_1E = jnp.arange(e)[None]
    is_new_FE = (place_1E == old.length) & np.ones((len(KEPT), 1), bool)
    # How far the pass came is a mark of all that it wrote.
    is_accepted_F1 = np.array([name == "accepted_BE" for name in KEPT])[:, None]
    is_new_FE |= is_accepted_F1 & (place_1E >= first) & (place_1E <= old.length)
    text_XFE = jnp.where(
        is_new_FE[None],
        jnp.stack(new_XF, axis=1)[:, :, None],
        old.text_KFE[from_X],
    )

    ends_X = ends_text(token_X, end_ids) | (length >= limit)
    may_X = ends_X & (jnp.arange(ends_X.size) < k)
    final_X = jnp.where(may_X, score_X / norm, -jnp.inf)
    ended_K, best_K = lax.top_k(jnp.concatenate([old.ended_score_K, final_X]), k)
    texts = jnp.concatenate([old.ended_KFE, text_XFE])
    lengths = jnp.concatenate([old.ended_length_K, jnp.zeros_like(token_X) + length])

    on_K = lax.top_k(jnp.where(ends_X, -jnp.inf, choice_X), k)[1]
    score_K = jnp.where(ends_X, -jnp.inf, score_X)[on_K]
    alive_K = score_K > -jnp.inf
    full = jnp.all(ended_K > -jnp.inf)
    hopeless = full & (jnp.max(score_K) / norm <= jnp.min(ended_K))
    done = (length >= limit) | hopeless | ~jnp.any(alive_K)

    row_K, last_K = old.row_K[from_X[on_K]], old.node_K[from_X[on_K]]
    is_child_KW = jnp.asarray(tree.parent_W)[None] == last_K[:, None]
    is_child_KW &= tokens_KW[row_K] == token_X[on_K][:, None]
    drafted_K = jnp.any(is_child_KW, axis=1)
    return Search(
        score_K=score_K,
        text_KFE=text_XFE[on_K],
        row_K=row_K,
        node_K=jnp.argmax(is_child_KW, axis=1).astype(jnp.int32),
        last_K=last_K,
        ended_score_K=ended_K,
        ended_length_K=lengths[best_K],
        ended_KFE=texts[best_K],
        length=length,
        done=done,
        active=old.active & ~done & jnp.all(drafted_K | ~alive_K),
    )
