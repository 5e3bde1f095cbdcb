"""Arithmetic of a training step.

Axes: D model width, T row length, V vocabulary.
"""

import dataclasses

from mtp_jax.config import Config, ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs by the part of the model that they are spent in."""

    trunk: float
    heads: float  # the heads' layers
    unembedding: float  # once a head

    @property
    def total(self) -> float:
        return self.trunk + self.heads + self.unembedding

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.trunk * times, self.heads * times, self.unembedding * times)


def layer_params(cfg: ModelConfig) -> int:
    """Matrix entries of one transformer layer."""
    attention = cfg.d_model * cfg.d_head * 2 * (cfg.num_query_heads + cfg.num_kv_heads)
    return attention + 3 * cfg.d_model * cfg.d_ff


def _attention_flops(cfg: Config) -> float:
    """FLOPs of causal attention, one layer forward, one position: half of 4 T D."""
    return 2 * cfg.data.seq_len * cfg.model.num_query_heads * cfg.model.d_head


def train_flops(cfg: Config) -> Flops:
    """FLOPs of the forward and backward pass for one position of a row.

    6 a matrix entry (2 forward, 4 backward; arXiv:2001.08361, section 2.1), counting
    the unembedding once for every head, plus 12 T D / 2 a layer for causal attention.
    Rematerialization is not counted: it is not useful work.
    """
    model = cfg.model
    layer = 6 * layer_params(model) + 3 * _attention_flops(cfg)
    n = model.n_future_tokens
    unembedding = 6 * model.vocab_size * model.d_model
    return Flops(model.num_trunk_layers * layer, n * layer, n * float(unembedding))


def executed_flops(cfg: Config) -> Flops:
    """`train_flops` and what config.compute has computed again in the backward pass.

    Trunk layers are computed again as `remat` says: not at all, the attention alone
    (where the products with weights are kept), or wholly; heads and unembedding, under
    the head loss of that name. What an attention kernel computes again by itself is not
    counted.
    """
    useful, compute = train_flops(cfg), cfg.compute
    attention = cfg.model.num_trunk_layers * _attention_flops(cfg)
    again = {"none": 0.0, "dots": attention}.get(compute.remat, useful.trunk / 3)
    of_heads = 4 / 3 if compute.head_loss == "remat" else 1.0
    return Flops(
        useful.trunk + again, useful.heads * of_heads, useful.unembedding * of_heads
    )


def train_flops_per_token(cfg: Config) -> float:
    """`train_flops`, all parts together."""
    return train_flops(cfg).total
