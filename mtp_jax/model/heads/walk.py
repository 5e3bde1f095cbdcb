"""The heads of a model over packed rows, one after another, whatever their kind.

Axes: N heads, B rows, T positions, D model width, V vocabulary, r rank of the bias by
the token before (Markov bias), E = D + r where there is one, else D.

The Markov bias adds w_markov_out w_markov_in[x] to the logits of heads 2 to n, x being
the token before the one that they predict. Since a sum of two products is one product
of what lies side by side, hidden states are followed by rows of w_markov_in, and those
of the unembedding by those of w_markov_out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mtp_jax.config import Attention, ModelConfig
from mtp_jax.model.attention import RowContext, attend_within
from mtp_jax.model.block import Block
from mtp_jax.model.heads import kind_of
from mtp_jax.model.layers import embed, rms_norm, unembed
from mtp_jax.parallel.sharding import spec, spec_like

_MOST_KEPT = 2  # layers of a head whose products are kept together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of one head, of several in a stack, or those that all have in common."""

    body: Any = None  # what `HeadKind.make` makes
    norm: jax.Array | None = None  # scale of the last norm, [D]
    unembedding: jax.Array | None = None  # as it is stored, [V, D]
    embedding: jax.Array | None = None  # of the tokens that heads read, [V, D]
    markov_in: jax.Array | None = None  # [V, r]
    markov_out: jax.Array | None = None  # [V, r]

    def __or__(self, other: "Weights") -> "Weights":
        """These weights, and those of the other for what is missing."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        found = {
            name: getattr(other, name) if mine is None else mine for name, mine in pairs
        }
        return Weights(**found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """The arrays that the outputs of all heads have gradients for."""

    trunk_BTD: jax.Array
    own: Weights  # in stacks: bodies of the heads that have one, and [N, ...]
    common: Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadInput:
    """A head, or several in a stack, with whatever it is to be run with."""

    own: Weights
    drafts: jax.Array | None = None  # 1; 0 for head 1, float32; None: no Markov bias
    previous_BT: jax.Array | None = None  # the token before the predicted one, int32
    extra: Any = None  # of the caller


def needs_tokens(cfg: ModelConfig) -> bool:
    """True if some head reads the token before the one that it predicts."""
    return cfg.heads.wait_for_tokens(cfg.n_future_tokens)


def previous_tokens(target_NBT: jax.Array) -> jax.Array:
    """The tokens before the targets, int32 [N, B, T]; of head 1 any, as none reads."""
    return jnp.concatenate([target_NBT[:1], target_NBT[:-1]])


def tokens_before(cfg: ModelConfig, tokens_BT: jax.Array) -> jax.Array | None:
    """The token before the one that each head predicts, int32 [N, B, T].

    That of head i at t is token t + i - 1 of the row, or 0 after its end; None if no
    head reads it.
    """
    if not needs_tokens(cfg):
        return None
    shifts = range(cfg.n_future_tokens)
    # Shifted by a pad of -i: jax 0.12 loses the sharding of a slice of one row.
    zero = jnp.int32(0)
    return jnp.stack(
        [lax.pad(tokens_BT, zero, [(0, 0, 0), (-i, i, 0)]) for i in shifts]
    )


def in_turn(
    cfg: ModelConfig, parts: Parts, previous_NBT: jax.Array | None, extra: Any
) -> tuple[HeadInput | None, HeadInput | None]:
    """Head 1 if it has no body, and all that have one in a stack, in their order.

    Args:
      cfg: of the model.
      parts: of the model and the trunk's output.
      previous_NBT: from `previous_tokens`; None if no head reads tokens.
      extra: a tree of arrays [N, ...], for `HeadInput.extra`.
    """
    n = cfg.n_future_tokens
    drafts_N = None
    if cfg.heads.markov_rank and n > 1:
        drafts_N = (jnp.arange(n) > 0).astype(jnp.float32)
    beside = dataclasses.replace(parts.own, body=None)
    rest = HeadInput(beside, drafts_N, previous_NBT, extra)
    first = None
    if not cfg.heads.wiring.first:
        first = jax.tree.map(lambda x: x[0], rest)
        rest = jax.tree.map(lambda x: x[1:], rest)
    if not cfg.heads.runs(n):
        return first, None
    own = dataclasses.replace(rest.own, body=parts.own.body)
    return first, dataclasses.replace(rest, own=own)


@dataclasses.dataclass(frozen=True)
class HeadRunner:
    """Runs heads of a model over packed rows."""

    cfg: ModelConfig
    rows: RowContext
    kernel: Attention

    def stream(
        self, weights: Weights, x_BTD: jax.Array, previous_BT: jax.Array | None
    ) -> jax.Array:
        """The stream of a head of what it reads, [B, T, D]; see `HeadKind.run`."""
        cfg, token_BTD = self.cfg, None
        if weights.body is not None and cfg.heads.wiring.reads_tokens:
            assert previous_BT is not None and weights.embedding is not None
            token_BTD = embed(weights.embedding, previous_BT, x_BTD.dtype.name)
        kind, norm = kind_of(cfg), self._norm(weights)
        return kind.run(cfg, weights.body, norm, x_BTD, token_BTD, self._through)

    def hidden(self, weights: Weights, stream_BTD: jax.Array) -> jax.Array:
        """The normed output of a head, [B, T, D]; see `HeadKind.finish`."""
        return kind_of(self.cfg).finish(self.cfg, self._norm(weights), stream_BTD)

    def _norm(self, weights: Weights) -> Callable[[jax.Array], jax.Array]:
        assert weights.norm is not None
        scale_D = weights.norm
        return lambda x_BTD: rms_norm(x_BTD, scale_D, self.cfg.norm_eps)

    def _through(self, block: Block, x_BTD: jax.Array) -> jax.Array:
        attend = attend_within(self.rows, self.kernel, self.cfg.heads_window)

        def layer(block, x_BTD):
            return block(x_BTD, self.rows.angles_BTk, attend)[0]

        if self.cfg.heads.layers > _MOST_KEPT:
            layer = jax.checkpoint(layer, prevent_cse=False)
        return layer(block, x_BTD)


def beside(weights: Weights, head: HeadInput, dtype: str) -> jax.Array | None:
    """Rows that follow the hidden states for the Markov bias, [B, T, r], or None."""
    if head.drafts is None:
        return None
    assert weights.markov_in is not None and head.previous_BT is not None
    found_BTr = embed(weights.markov_in, head.previous_BT, dtype)
    return found_BTr * head.drafts.astype(dtype)


def visit_heads(
    runner: HeadRunner,
    parts: Parts,
    previous_NBT: jax.Array | None,
    extra: Any,
    visit: Callable[[Weights, HeadInput, jax.Array], Any],
    around: Callable[[Callable], Callable] = lambda one_head: one_head,
) -> Any:
    """Runs all heads, one after another, and stacks what is made of each, [N, ...].

    Args:
      runner: of the model.
      parts: of the model and the trunk's output.
      previous_NBT, extra: as for `in_turn`.
      visit: takes a head's weights, its input and its normed output [B, T, D].
      around: wraps the function of one head, as `jax.checkpoint` does.
    """
    cfg = runner.cfg
    wiring, dtype = cfg.heads.wiring, cfg.compute_dtype
    first, rest = in_turn(cfg, parts, previous_NBT, extra)

    def one_head(common, x_BTD, head):
        if x_BTD is None:
            x_BTD = parts.trunk_BTD.astype(dtype)
        weights = head.own | common
        stream_BTD = runner.stream(weights, x_BTD, head.previous_BT)
        found = visit(weights, head, runner.hidden(weights, stream_BTD))
        return (None if wiring.reads == "trunk" else stream_BTD), found

    is_star = wiring.reads == "trunk"
    x_BTD, of_first = None if is_star else parts.trunk_BTD.astype(dtype), None
    if first is not None:
        bare = dataclasses.replace(parts.common, body=None)
        x_BTD, of_first = around(functools.partial(one_head, bare))(x_BTD, first)
    if rest is None:
        return jax.tree.map(lambda x: x[None], of_first)
    with_body = around(functools.partial(one_head, parts.common))
    backwards = wiring.reads == "after"
    count = cfg.heads.runs(cfg.n_future_tokens)
    found = lax.scan(with_body, x_BTD, rest, length=count, reverse=backwards)[1]
    if of_first is None:
        return found
    return jax.tree.map(
        lambda x, of_rest: jnp.concatenate([x[None], of_rest]), of_first, found
    )


def all_hidden(
    runner: HeadRunner, parts: Parts, previous_NBT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Normed outputs of all heads, [N, B, T, D], and their logits, [N, B, T, V]."""
    dtype = runner.cfg.compute_dtype

    def visit(weights, head, hidden_BTD):
        return hidden_BTD, beside(weights, head, dtype)

    hidden_NBTD, side_NBTr = visit_heads(runner, parts, previous_NBT, None, visit)
    out = PartitionSpec(None, *spec_like(hidden_NBTD[0], "vocab"))
    both = parts.own | parts.common
    logits_NBTV = _products(hidden_NBTD, both.unembedding, out)
    if side_NBTr is not None:
        logits_NBTV += _products(side_NBTr, both.markov_out, out)
    return hidden_NBTD, logits_NBTV


def _products(x_NBTX, w_VX, out):
    """Logits of every head by the one table, or each by its own, [N, V, X]."""
    w_VX = w_VX.astype(x_NBTX.dtype)
    if w_VX.ndim == 2:
        return unembed(x_NBTX, jax.sharding.reshard(w_VX, spec("vocab", None)), out)
    w_NVX = jax.sharding.reshard(w_VX, spec(None, "vocab", None))
    return jnp.einsum(
        "nbtx,nvx->nbtv",
        x_NBTX,
        w_NVX,
        out_sharding=out,
        preferred_element_type=jnp.float32,
    )
