"""Anticausal heads: each is a transformer layer over the stream of the head after it.

arXiv:2404.19737, appendix B. The last reads the trunk's output, and head 1 comes at the
end, as deep as an ordinary model of as many layers: the others are exits on its way.
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
