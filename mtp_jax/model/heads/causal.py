"""Causal heads: each is a transformer layer over the stream of the head before it.

arXiv:2404.19737, appendix B. The first reads the trunk's output. The stream goes on
without a norm; every head norms its own for the unembedding.
"""

from mtp_jax.model.heads.base import HeadKind, make_layers, normed
from mtp_jax.model.heads.parallel import entries, run_layers, vectors

KIND = HeadKind(
    make=make_layers,
    run=run_layers,
    finish=normed,
    entries=entries,
    vectors=vectors,
)
