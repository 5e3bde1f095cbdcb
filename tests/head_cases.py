"""Small models with heads of every kind and option."""

import dataclasses

from models import TINY

from mtp_jax.config import HeadsConfig

# Every kind, and every option with at least one kind that it suits.
OPTIONS = {
    "parallel, 3 layers, bias": {"layers": 3, "markov_rank": 8},
    "parallel, own tables and norms": {"unembedding": "own", "norm": "own"},
    "linear, own norms": {"kind": "linear", "norm": "own"},
    "linear, own tables, bias": {
        "kind": "linear",
        "unembedding": "own",
        "markov_rank": 8,
    },
    "residual": {"kind": "residual"},
    "residual, 2 blocks, own tables and norms": {
        "kind": "residual",
        "layers": 2,
        "unembedding": "own",
        "norm": "own",
    },
    "causal": {"kind": "causal"},
    "causal, shared, 2 layers": {"kind": "causal", "shared": True, "layers": 2},
    "anticausal": {"kind": "anticausal", "norm": "own"},
    "anticausal, shared, bias": {
        "kind": "anticausal",
        "shared": True,
        "markov_rank": 8,
    },
    "serial": {"kind": "serial"},
    "serial, normed, own norms": {
        "kind": "serial",
        "hidden": "after",
        "concat": "embedding_first",
        "norm": "own",
    },
    "serial, shared, one cache": {
        "kind": "serial",
        "shared": True,
        "draft_cache": "shared",
    },
    "serial, shared, 2 layers, own tables, bias": {
        "kind": "serial",
        "shared": True,
        "layers": 2,
        "unembedding": "own",
        "markov_rank": 8,
    },
}
TIED = "serial"  # of this one the embedding is the unembedding


def model_of(name, n=4, trunk=2, **changes):
    """A model whose trunk has so many layers."""
    heads = HeadsConfig(**OPTIONS[name])
    return dataclasses.replace(
        TINY,
        num_layers=trunk + heads.counted_layers(n),
        n_future_tokens=n,
        tie_embeddings=name == TIED,
        heads=heads,
        **changes,
    )
