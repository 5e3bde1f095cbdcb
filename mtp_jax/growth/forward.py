"""Forward passes that starts are fitted to: what heads read, and are to say.

Axes: B rows, T positions, D model width, H query heads, K head width, F feed-forward
width, X features.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.config import ModelConfig
from mtp_jax.model.attention import RowContext, attend_within
from mtp_jax.model.block import Attend, Block
from mtp_jax.model.heads.base import blocks_of
from mtp_jax.model.heads.walk import HeadRunner, Weights
from mtp_jax.model.language_model import LanguageModel, run_trunk
from mtp_jax.model.layers import embed, rms_norm
from mtp_jax.parallel.sharding import spec_like

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Pass:
    """The trunk's output over rows of a batch, and heads to run over it."""

    model: LanguageModel
    batch: Batch  # tokens, segments and positions, int32 [B, S]
    rows: RowContext
    runner: HeadRunner
    trunk_BTD: jax.Array

    @classmethod
    def over(cls, model: LanguageModel, batch: Batch) -> "Pass":
        """Runs the trunk over a batch [B, S], S = T + n."""
        n = model.cfg.n_future_tokens
        segments_BT = batch["segments"][:, :-n]
        rows = RowContext(model.angles(batch["positions"][:, :-n]), segments_BT)
        x_BTD = model.embed(batch["tokens"][:, :-n])
        trunk_BTD = run_trunk(model, x_BTD, rows, "auto")
        return cls(model, batch, rows, HeadRunner(model.cfg, rows, "auto"), trunk_BTD)

    @property
    def cfg(self) -> ModelConfig:
        return self.model.cfg

    def weights(self, head: int) -> Weights:
        """The weights of a head, counted from 0."""
        parts, heads = self.model.parts(self.trunk_BTD), self.cfg.heads
        own = dataclasses.replace(parts.own, body=None)
        found = jax.tree.map(lambda x: x[head], own) | parts.common
        if not heads.wiring.first and head == 0:
            return dataclasses.replace(found, body=None)
        if parts.own.body is not None:
            at = head if heads.wiring.first else head - 1
            body = jax.tree.map(lambda x: x[at], parts.own.body)
            found = dataclasses.replace(found, body=body)
        return found

    def before(self, head: int) -> jax.Array:
        """The token before the one that a head predicts, int32 [B, T]."""
        t = self.trunk_BTD.shape[1]
        return self.batch["tokens"][:, head : head + t]

    def token_before(self, head: int) -> jax.Array:
        """The embedding of that token, float32 [B, T, D]."""
        return self.model.embed(self.before(head)).astype(jnp.float32)

    def read_by(self, head: int) -> jax.Array:
        """The trunk's output or a stream, [B, T, D], whichever a head reads."""
        reads, x_BTD = self.cfg.heads.wiring.reads, self.trunk_BTD
        if reads == "trunk":
            return x_BTD
        n = self.cfg.n_future_tokens
        others = range(head) if reads == "before" else range(n - 1, head, -1)
        for other in others:
            x_BTD = self.runner.stream(self.weights(other), x_BTD, self.before(other))
        return x_BTD

    def hidden(self, head: int) -> jax.Array:
        """The normed output of a head, [B, T, D]."""
        weights = self.weights(head)
        stream_BTD = self.runner.stream(weights, self.read_by(head), self.before(head))
        return self.runner.hidden(weights, stream_BTD)

    def bias_rows(self, head: int) -> jax.Array | None:
        """Rows of the Markov bias, beside the hidden states, [B, T, r], or None."""
        if not self.cfg.heads.markov_rank or not head:
            return None
        common = self.model.parts(self.trunk_BTD).common
        assert common.markov_in is not None
        return embed(common.markov_in, self.before(head), self.cfg.compute_dtype)

    def said_later(self, head: int) -> tuple[jax.Array, jax.Array]:
        """The normed output of head 1, its scale aside, where it predicts the same.

        Head i at t speaks of the token that head 1 speaks of at t + i - 1.

        Returns:
          Those states, float32 [B, T, D], and 1 where there is one in the same
          document, else 0, [B, T].
        """
        x_BTD = self.trunk_BTD
        if self.cfg.heads.wiring.first:
            x_BTD = self.runner.stream(self.weights(0), self.read_by(0), None)
        normed_BTD = unit(x_BTD, self.cfg.norm_eps)
        segments_BT = self.rows.segments_BT
        t = segments_BT.shape[1]
        later_BT = _rolled(segments_BT, head)
        inside_BT = (jnp.arange(t) < t - head)[None]
        same_BT = (segments_BT == later_BT) & (segments_BT > 0) & inside_BT
        return _rolled(normed_BTD, head), same_BT.astype(jnp.float32)


def unit(x_BTD: jax.Array, eps: float) -> jax.Array:
    """x normed, without a scale, float32 [B, T, D]."""
    ones = jnp.ones(x_BTD.shape[-1], jnp.float32)
    return rms_norm(x_BTD.astype(jnp.float32), ones, eps)


def joined(run: Pass, head: int, weights: Weights) -> jax.Array:
    """Features that the matrix of a serial module multiplies, [B, T, 2 D]."""
    cfg, body = run.cfg, weights.body
    assert weights.embedding is not None
    dtype = run.trunk_BTD.dtype.name
    token_BTD = embed(weights.embedding, run.before(head), dtype)
    parts = [
        rms_norm(run.read_by(head), body.norm_hidden.get_value(), cfg.norm_eps),
        rms_norm(token_BTD, body.norm_token.get_value(), cfg.norm_eps),
    ]
    if cfg.heads.concat == "embedding_first":
        parts.reverse()
    return jnp.concatenate(parts, axis=-1)


def attention_reads(run: Pass, head: int) -> tuple[jax.Array, jax.Array]:
    """Values that a head's last attention reads, [B, T, H K], and its input."""
    block, x_BTD = _last_block(run, head)
    attend = _attend(run)

    def kept(*of: jax.Array):
        read_BTHK, _ = attend(*of)
        return read_BTHK, read_BTHK

    _, read_BTHK = block(x_BTD, run.rows.angles_BTk, kept)
    b, t = read_BTHK.shape[:2]
    return read_BTHK.reshape(b, t, -1, out_sharding=spec_like(x_BTD, None)), x_BTD


def feed_forward_reads(run: Pass, head: int) -> tuple[jax.Array, jax.Array]:
    """Features that a head's last `w_down` multiplies, [B, T, F], and its residual."""
    block, x_BTD = _last_block(run, head)
    attend = _attend(run)
    # A feed-forward layer without output leaves what its output is added to.
    silent = jax.tree.map(lambda x: x, block)
    silent.mlp.w_down.set_value(jnp.zeros_like(block.mlp.w_down.get_value()))
    base_BTD, _ = silent(x_BTD, run.rows.angles_BTk, attend)
    h_BTD = rms_norm(base_BTD, block.norm_mlp.get_value(), run.cfg.norm_eps)
    return block.mlp.inner(h_BTD), base_BTD


def _attend(run: Pass) -> Attend:
    """The attention of layers of heads."""
    return attend_within(run.rows, "auto", run.cfg.heads_window)


def _last_block(run: Pass, head: int) -> tuple[Block, jax.Array]:
    """The last layer of a head of layers, and its input."""
    x_BTD = run.read_by(head)
    attend = _attend(run)
    *first, last = blocks_of(run.cfg, run.weights(head).body)
    for block in first:
        x_BTD, _ = block(x_BTD, run.rows.angles_BTk, attend)
    return last, x_BTD


def _rolled(x: jax.Array, by: int) -> jax.Array:
    """x, `by` positions earlier; the last ones are of no use."""
    return jnp.roll(x, -by, axis=1) if by else x
