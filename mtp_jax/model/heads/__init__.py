"""The kinds of prediction heads, one file each."""

from mtp_jax.config import ModelConfig
from mtp_jax.model.heads import anticausal, causal, linear, parallel, residual, serial
from mtp_jax.model.heads.base import HeadKind

_KINDS: dict[str, HeadKind] = {
    "parallel": parallel.KIND,
    "linear": linear.KIND,
    "residual": residual.KIND,
    "causal": causal.KIND,
    "anticausal": anticausal.KIND,
    "serial": serial.KIND,
}


def kind_of(cfg: ModelConfig) -> HeadKind:
    """The kind of a model's heads."""
    return _KINDS[cfg.heads.kind]
