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


def train_flops(cfg: Config) -> Flops:
    """FLOPs of the forward and backward pass for one position of a row.

    6 a matrix entry (2 forward, 4 backward; arXiv:2001.08361, section 2.1), counting
    the unembedding once for every head, plus 12 T D / 2 a layer for causal attention
    without a window.
    Rematerialization is not counted: it is not useful work.
    """
    model, heads, n = cfg.model, cfg.model.heads, cfg.model.n_future_tokens
    trunk = model.num_trunk_layers * 6 * layer_entries(model) + 3 * _of_trunk(cfg)
    body = 6.0 * kind_of(model).entries(model)
    if heads.wiring.layered:
        body += heads.layers * 3 * _attention_flops(cfg, model.heads_window)
    width = model.d_model + (heads.markov_rank if n > 1 else 0)
    unembedding = 6.0 * model.vocab_size * width
    return Flops(trunk, heads.runs(n) * body, n * unembedding)


def executed_flops(cfg: Config) -> Flops:
    """`train_flops` and what config.compute has computed again in the backward pass.

    Trunk layers are computed again as `remat` says: not at all, the attention alone
    (where the products with weights are kept), or wholly; heads and unembedding, under
    the head loss of that name, and the bodies of heads in a chain under `fused`. What
    an attention kernel computes again by itself is not
    counted.
    """
    useful, compute = train_flops(cfg), cfg.compute
    again = {"none": 0.0, "dots": _of_trunk(cfg)}.get(compute.remat, useful.trunk / 3)
    remat = compute.head_loss == "remat"
    chained = cfg.model.heads.wiring.reads != "trunk"
    twice = remat or (chained and compute.head_loss == "fused")
    return Flops(
        useful.trunk + again,
        useful.heads * (4 / 3 if twice else 1.0),
        useful.unembedding * (4 / 3 if remat else 1.0),
    )


def train_flops_per_token(cfg: Config) -> float:
    """`train_flops`, all parts together."""
    return train_flops(cfg).total
