"""Sizes of the parts of a model, and the ordinary models to compare it with.

Axes: D model width, V vocabulary, r rank of the Markov bias.
"""

import dataclasses

from mtp_jax.config import Config, ModelConfig, OptimConfig
from mtp_jax.model.flops import train_flops
from mtp_jax.model.heads import kind_of
from mtp_jax.model.heads.base import layer_entries, layer_vectors


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of parameters by the part of the model that they belong to."""

    trunk: int  # with the last norm, unless heads have their own
    heads: int  # bodies, and norms of their own
    tables: int  # of tokens: embedding, unembeddings, the bias by the token before

    @property
    def total(self) -> int:
        return self.trunk + self.heads + self.tables


@dataclasses.dataclass(frozen=True)
class EqualModels:
    """Layers of the model of one head that equals a model in one respect.

    Of the same width and vocabulary. Fractions are of a layer: a model of that size is
    between those of the next whole numbers.
    """

    params: float  # as many parameters
    training: float  # as many useful FLOPs a trained position
    drafting: float  # as many weights read in a drafting pass


def sizes_of(cfg: ModelConfig) -> Sizes:
    """The sizes of a model's parts."""
    d, v, n, heads = cfg.d_model, cfg.vocab_size, cfg.n_future_tokens, cfg.heads
    kind = kind_of(cfg)
    trunk = cfg.num_trunk_layers * (layer_entries(cfg) + layer_vectors(cfg))
    bodies = heads.bodies(n) * (kind.entries(cfg) + kind.vectors(cfg))
    own_norms = heads.norm == "own"
    unembeddings = n if heads.unembedding == "own" else int(not cfg.tie_embeddings)
    bias = 2 * heads.markov_rank * v if n > 1 else 0
    return Sizes(
        trunk=trunk + (0 if own_norms else d),
        heads=bodies + (n * d if own_norms else 0),
        tables=(1 + unembeddings) * v * d + bias,
    )


def first_entries(cfg: ModelConfig) -> int:
    """Matrix entries that a forward pass of head 1 alone reads, table included."""
    heads = cfg.heads
    bodies = heads.runs(cfg.n_future_tokens) if heads.wiring.reads == "after" else 1
    bodies = bodies if heads.wiring.first else 0
    trunk = cfg.num_trunk_layers * layer_entries(cfg)
    return trunk + bodies * kind_of(cfg).entries(cfg) + cfg.vocab_size * cfg.d_model


def drafting_entries(cfg: ModelConfig) -> int:
    """Matrix entries that a pass reads that verifies drafts and drafts again.

    The trunk, all heads, and tables: head 1's, and for drafts the shared one once more,
    or once a draft where the heads have their own or read the embeddings of tokens.
    Weights that all heads share are read once by each of them.
    """
    n, heads = cfg.n_future_tokens, cfg.heads
    bodies = heads.runs(n) * kind_of(cfg).entries(cfg)
    table = cfg.vocab_size * cfg.d_model
    one_by_one = heads.wiring.reads_tokens or heads.unembedding == "own"
    drafts = n - 1 if one_by_one else min(n - 1, 1)
    bias = (n - 1) * cfg.vocab_size * heads.markov_rank
    trunk = cfg.num_trunk_layers * layer_entries(cfg)
    return trunk + bodies + (1 + drafts) * table + bias


def equal_models(cfg: Config) -> EqualModels:
    """The ordinary models that equal a run's in size, in training and in drafting."""
    model, d = cfg.model, cfg.model.d_model
    of_layer = layer_entries(model)
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * d
    flops = train_flops(cfg)
    # Of a layer that learns: what a trunk of one more would add.
    longer = model.resized(model.num_layers + 1, model.n_future_tokens)
    whole = dataclasses.replace(cfg, optim=OptimConfig())
    with_one = train_flops(dataclasses.replace(whole, model=longer))
    of_one = with_one.trunk - train_flops(whole).trunk
    unembedding = 6.0 * model.vocab_size * d
    return EqualModels(
        params=(sizes_of(model).total - tables - d) / (of_layer + layer_vectors(model)),
        training=max(flops.total - unembedding, 0.0) / of_one,
        drafting=(drafting_entries(model) - model.vocab_size * d) / of_layer,
    )


def told(cfg: Config) -> str:
    """The sizes and the models to compare with, as a line for people."""
    sizes, equal = sizes_of(cfg.model), equal_models(cfg)
    parts = ", ".join(
        f"{name} {getattr(sizes, name) / 1e6:.2f} M"
        for name in ("trunk", "heads", "tables")
    )
    return (
        f"parameters: {parts}; n = 1 is as large with {equal.params:.1f} layers, as "
        f"costly a step with {equal.training:.1f}, a drafting pass with "
        f"{equal.drafting:.1f}"
    )
