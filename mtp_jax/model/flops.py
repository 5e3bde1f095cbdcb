"""Arithmetic of a training step.

Axes: D model width, T row length, V vocabulary.
"""

import dataclasses

from mtp_jax.config import Config
from mtp_jax.model.heads import kind_of
from mtp_jax.model.heads.base import layer_entries


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by the part of the model that they are spent in."""

    trunk: float
    heads: float  # the heads' bodies
    unembedding: float  # once a head, with the bias by the token before

    @property
    def total(self) -> float:
        return self.trunk + self.heads + self.unembedding

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.trunk * times, self.heads * times, self.unembedding * times)


def _attention_flops(cfg: Config, window: int) -> float:
    """FLOPs of causal attention, one layer forward, one position: half of 4 T D.

    With a window of w < T positions a query reads w (1 - w / 2T) on average, not T / 2.
    """
    t, width = cfg.data.seq_len, cfg.model.num_query_heads * cfg.model.d_head
    if window == 0 or window >= t:
        return 2 * t * width
    return 4 * width * window * (1 - window / (2 * t))


def _of_trunk(cfg: Config) -> float:
    """FLOPs of attention in all layers of the trunk, forward, one position."""
    return sum(_attention_flops(cfg, w) for w in cfg.model.trunk_windows)


@dataclasses.dataclass(frozen=True)
class Backward:
    """The gradients that a step takes in a part of the model."""

    inputs: bool  # of what its matrices read
    weights: bool  # of its matrices

    @property
    def runs(self) -> bool:
        """True if the part has a backward pass."""
        return self.inputs or self.weights

    def products(self, forward: float) -> float:
        """FLOPs of products with weights, of those that the forward pass makes."""
        return forward * (1 + self.inputs + self.weights)

    def attention(self, forward: float) -> float:
        """FLOPs of attention, likewise; its backward pass is twice as much."""
        return forward * (3 if self.runs else 1)


def backward_of(cfg: Config) -> tuple[Backward, Backward, Backward]:
    """The gradients that a step takes in trunk, heads' bodies, and their unembedding.

    Those of parameters that `config.optim.frozen` does not name, and those that these
    need: a frozen trunk has a backward pass if the embedding below it learns. Gradients
    of low-rank updates are made of those of the matrices that they are added to.
    """
    optim, frozen, heads = cfg.optim, cfg.optim.frozen, cfg.model.heads
    trunk = "trunk" not in frozen or optim.lora_rank > 0
    embedding, bodies = "embedding" not in frozen, "heads" not in frozen
    norms = "norms" not in frozen
    table = embedding if cfg.model.tie_embeddings else "unembedding" not in frozen
    below = trunk or embedding
    # The norms of a layer, or blocks that read others, are behind its first matrices.
    within = bodies and (heads.wiring.layered or heads.layers > 1)
    if heads.kind == "residual":
        below = below or norms
    return (
        Backward(trunk or embedding, trunk),
        Backward(below or within, bodies),
        Backward(below or bodies or norms, table),
    )


def train_flops(cfg: Config) -> Flops:
    """FLOPs of the forward and backward pass for one position of a row.

    6 a matrix entry (2 forward, 4 backward; arXiv:2001.08361, section 2.1), counting
    the unembedding once for every head, plus 12 T D / 2 a layer for causal attention
    without a window. Of what is frozen only the forward pass counts, and of the
    backward pass what others need (`backward_of`).
    Rematerialization is not counted: it is not useful work; neither is the product of
    low-rank updates, which is one a microbatch.
    """
    return _flops(cfg, *backward_of(cfg))


def _flops(
    cfg: Config, of_trunk: Backward, of_bodies: Backward, of_table: Backward
) -> Flops:
    """FLOPs for one position with such backward passes of the parts."""
    model, heads, n = cfg.model, cfg.model.heads, cfg.model.n_future_tokens
    trunk = of_trunk.products(model.num_trunk_layers * 2 * layer_entries(model))
    trunk += of_trunk.attention(_of_trunk(cfg))
    body = of_bodies.products(2.0 * kind_of(model).entries(model))
    if heads.wiring.layered:
        attention = _attention_flops(cfg, model.heads_window)
        body += heads.layers * of_bodies.attention(attention)
    width = model.d_model + (heads.markov_rank if n > 1 else 0)
    table = 2.0 * model.vocab_size * width
    unembedding = heads.runs(n) * of_table.products(table)
    # Head 1 of some kinds has no body: it is the trunk's, and the norm's.
    frozen = cfg.optim.frozen
    learns = of_trunk.runs or (of_table.inputs and "norms" not in frozen)
    bare = dataclasses.replace(of_table, inputs=learns)
    unembedding += (n - heads.runs(n)) * bare.products(table)
    return Flops(trunk, heads.runs(n) * body, unembedding)


def executed_flops(cfg: Config) -> Flops:
    """`train_flops` and what config.compute has computed again in the backward pass.

    Trunk layers are computed again as `remat` says: not at all, the attention alone
    (where the products with weights are kept), or wholly; heads and unembedding, under
    the head loss of that name, and the bodies of heads in a chain under `fused`. What
    has no backward pass is not computed again; what an attention kernel computes again
    by itself is not counted.
    """
    useful, compute = train_flops(cfg), cfg.compute
    forward = _flops(cfg, *[Backward(False, False)] * 3)
    of_trunk, of_bodies, of_table = backward_of(cfg)
    again = {"none": 0.0, "dots": _of_trunk(cfg)}.get(compute.remat, forward.trunk)
    remat = compute.head_loss == "remat"
    chained = cfg.model.heads.wiring.reads != "trunk"
    twice = remat or (chained and compute.head_loss == "fused")
    return Flops(
        useful.trunk + again * of_trunk.runs,
        useful.heads + forward.heads * (twice and of_bodies.runs),
        useful.unembedding + forward.unembedding * (remat and of_table.runs),
    )


def train_flops_per_token(cfg: Config) -> float:
    """`train_flops`, all parts together."""
    return train_flops(cfg).total
