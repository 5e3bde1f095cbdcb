"""Choosing the tree of drafts that a model does best with.

On held-out text, every position is asked how the heads rank what head 1 will predict:
the rank of its token at t + i - 1 among the candidates of head i at t. The ranks of
heads 2..n at a position are a path, so how often a node of a tree would be right, its
path before it included, is the share of positions whose path begins with that of the
node.
Heads that read tokens are given those of the text, and the bias by the token before
that of the path. The share is the product of the acceptances along the path, each given
those before it. Serial heads with one cache read it as in a pass that drafts at that
position; the others are asked at all positions at once. The nodes with the largest
shares are the tree (arXiv:2401.10774, section 2.3.3): no tree of as many nodes commits
more tokens.

Axes: B passages, T tokens of a passage, U positions of it with n - 1 after them, X
positions of all passages, M = n - 1 drafting heads, D model width, V vocabulary.
"""

import collections
import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.checkpoint.restore import Restored, as_restored
from mtp_jax.config import ModelConfig
from mtp_jax.data.prompts import heldout_passages
from mtp_jax.decode.cache import Cache, at_slot, chain, decode_trunk, make_cache
from mtp_jax.decode.decode_model import DecodeModel, build, unstack
from mtp_jax.decode.decoders.sampling import most_likely
from mtp_jax.decode.drafting import Anchor, Drafting
from mtp_jax.decode.head_passes import at_all, read_first
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import batch_shards, spec

PASSAGE_TOKENS = 256  # of a passage, at most
_BATCH = 8  # passages read at once, of each shard of the batch
_TOP = 10  # figures of a head: how often its best 1, 2 ... 10 candidates are enough


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A tree of drafts and what was measured for it."""

    positions: int
    nodes: list[tuple[tuple[int, ...], float]]  # path, share of positions; most first
    # By head from 2 on: share of positions where one of the best k candidates is right,
    # of those where the path before it is in the tree.
    top_k: list[list[float]]
    # Share of positions at which the first candidates of heads 2 to i are right, for
    # each i from 2 on: what a blockwise pass accepts of each draft.
    accepted: list[float]
    step: int | None = None  # checkpoint that was measured
    data: tuple[str, ...] = ()  # folders of the corpora

    @property
    def tokens_per_forward(self) -> float:
        """Expected tokens a forward pass with the tree, on text like this."""
        return 1.0 + sum(share for _, share in self.nodes)

    @property
    def chain(self) -> float:
        """Tokens a forward pass with the heads' first candidates alone."""
        return 1.0 + sum(self.accepted)

    def content(self) -> dict[str, Any]:
        """The tree and its figures in JSON's types, as decoders read them."""
        return {
            "step": self.step,
            "data": list(self.data),
            "positions": self.positions,
            "tokens_per_forward": self.tokens_per_forward,
            "chain_tokens_per_forward": self.chain,
            "heads": [
                {"head": i, "top_k": shares} for i, shares in enumerate(self.top_k, 2)
            ],
            "nodes": [
                {"path": list(path), "accepted": share} for path, share in self.nodes
            ],
        }


def calibrate(
    model: Restored | str | os.PathLike[str], *, passages: int = 128, nodes: int = 24
) -> Calibration:
    """Measures the heads on held-out text and chooses a tree of drafts.

    Args:
      model: a restored model with all heads that are to draft, or the workdir of a run.
      passages: held-out passages of up to 256 tokens to measure; all, if there are
        fewer.
      nodes: drafts in the tree, at most.

    Returns:
      The tree and its figures. Written as JSON, `content()` is a file that the decoders
      `tree` and `typical` read.

    Raises:
      UserError: no such run, a model of one head, or no document is long enough.
    """
    restored = as_restored(model)
    cfg = restored.config.model
    n, sources = cfg.n_future_tokens, restored.config.data.sources
    if n == 1:
        raise UserError("the model has one head; a tree needs others that draft.")
    rows = heldout_passages(sources, passages, n, PASSAGE_TOKENS)
    if not rows:
        raise UserError(
            f"no held-out document of {', '.join(sources)} has {n} tokens; prepare "
            "more text."
        )
    ranks_XM = measure_ranks(
        cfg, restored.params, rows, restored.mesh, restored.tokenizer.vocab_size
    )
    chosen = choose(ranks_XM, nodes)
    return dataclasses.replace(chosen, step=restored.step, data=tuple(sources))


def measure_ranks(
    cfg: ModelConfig,
    params: Any,
    rows: Sequence[np.ndarray],
    mesh: jax.sharding.Mesh,
    ids: int | None = None,
) -> np.ndarray:
    """Ranks that heads 2..n give to what head 1 will predict, int32 [X, M]; 0 is best.

    Args:
      cfg: of the model.
      params: as `model_builder` makes them, on the mesh.
      rows: passages of at least n tokens each, token ids.
      mesh: the mesh.
      ids: as for `build`.
    """
    size, found = _BATCH * batch_shards(mesh), []
    n, most = cfg.n_future_tokens, max(map(len, rows))
    # No position sees what stands after it, so what fills a row up changes nothing.
    rows_T = [np.pad(row, (0, most - len(row))) for row in rows]
    with jax.set_mesh(mesh):
        params = unstack(cfg, params)
        ranks = jax.jit(
            lambda params, tokens_BT: _ranks(build(cfg, params, ids), tokens_BT)
        )
        sharding = jax.NamedSharding(mesh, spec("batch", None))
        for start in range(0, len(rows), size):
            now = rows_T[start : start + size]
            # The last ones are read again to fill the batch, and not counted twice.
            tokens_BT = np.stack([*now, *[now[-1]] * (size - len(now))])
            ranks_BUM = ranks(params, jax.device_put(tokens_BT, sharding))
            ranks_BUM = np.asarray(ranks_BUM)
            lengths = map(len, rows[start : start + size])
            found += [ranks_BUM[b, : k - n + 1] for b, k in enumerate(lengths)]
    return np.concatenate(found)


def _ranks(model: DecodeModel, tokens_BT: jax.Array) -> jax.Array:
    """Ranks in a batch of passages, int32 [B, U, M]; see `measure_ranks`."""
    (b, t), n, cfg = tokens_BT.shape, len(model.heads), model.cfg
    cache = make_cache(cfg, n, b, t)
    new = chain(tokens_BT, jnp.zeros(b, jnp.int32, out_sharding=spec("batch")))
    trunk_BTD, cache = decode_trunk(model, new, cache)
    ids_11V = jnp.arange(cfg.vocab_size)[None, None]
    head_BTD, source_BTX, cache = read_first(model, trunk_BTD, new, cache)
    predicted_BT = most_likely(model.logits(head_BTD))
    ranks, u = [], t - n + 1
    if cfg.heads.draft_cache == "shared":
        others = _at_each(model, source_BTX, cache, tokens_BT)
    else:
        others, _ = at_all(model, source_BTX, new, cache, tokens_BT)
    for i, head_BTD in enumerate(others, start=1):
        logits_BUV = model.logits(head_BTD[:, :u], i)
        if model.w_markov_in_Vr is not None:
            # The node's parent on the path of what head 1 will predict.
            logits_BUV = logits_BUV + model.bias(predicted_BT[:, i - 1 : i - 1 + u])
        predicted_BU1 = predicted_BT[:, i : i + u, None]
        is_predicted_BUV = ids_11V == predicted_BU1
        own_BU1 = jnp.sum(
            jnp.where(is_predicted_BUV, logits_BUV, 0.0), -1, keepdims=True
        )
        before_BUV = (logits_BUV > own_BU1) | (
            (logits_BUV == own_BU1) & (ids_11V < predicted_BU1)
        )
        ranks.append(jnp.sum(before_BUV, axis=-1, dtype=jnp.int32))
    return jnp.stack(ranks, axis=-1)


def _at_each(
    model: DecodeModel, source_BTX: jax.Array, cache: Cache, tokens_BT: jax.Array
) -> list[jax.Array]:
    """Normed outputs of serial heads that draft at one position after another.

    With one cache the entries of heads 3 to n are there for one pass alone, so no pass
    can be made of all positions. [B, U, D] of each head.
    """
    n, u = model.cfg.n_future_tokens, tokens_BT.shape[1] - model.cfg.n_future_tokens + 1
    like_B = jnp.zeros_like(tokens_BT[:, 0])

    def at(cache, position):
        def one(x_BTX, ahead=0):
            return at_slot(x_BTX, like_B + position + ahead)[:, None]

        new = chain(one(tokens_BT), like_B + position)
        anchor = Anchor(one(source_BTX), new, like_B, tokens_BT)
        drafting = Drafting(model, anchor, cache)
        found = [drafting.hidden_after(i, one(tokens_BT, i)) for i in range(1, n)]
        return drafting.cache, jnp.concatenate(found, axis=1)

    _, hidden_UBMD = jax.lax.scan(at, cache, jnp.arange(u))
    hidden_MBUD = jnp.moveaxis(hidden_UBMD, (0, 2), (2, 0))
    return [hidden_MBUD[i] for i in range(n - 1)]


def choose(ranks_XM: np.ndarray, nodes: int) -> Calibration:
    """The tree of at most so many nodes that is right most often.

    Args:
      ranks_XM: from `measure_ranks`.
      nodes: most drafts in the tree.
    """
    positions, m = ranks_XM.shape
    paths_X = list(map(tuple, ranks_XM.tolist()))
    counts = collections.Counter(
        path[:depth] for path in paths_X for depth in range(1, m + 1)
    )
    # A path is no more frequent than what it begins with, which is shorter: parents
    # come before their children.
    order = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:nodes]
    inside = {(), *order}
    top_k = []
    for i in range(m):
        ranks = [path[i] for path in paths_X if path[:i] in inside]
        within = np.bincount(ranks, minlength=_TOP)[:_TOP] if ranks else np.zeros(_TOP)
        top_k.append((np.cumsum(within) / max(len(ranks), 1)).tolist())
    first = itertools.accumulate(
        ((ranks_XM[:, i] == 0) for i in range(m)), np.logical_and
    )
    return Calibration(
        positions=positions,
        nodes=[(path, counts[path] / positions) for path in order],
        top_k=top_k,
        accepted=[float(np.mean(right_X)) for right_X in first],
    )
