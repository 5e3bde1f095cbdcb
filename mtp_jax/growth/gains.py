"""A gain a head: the number by which a start's logits are multiplied, by its loss.

The loss of a head is convex in its gain, so the best of a few, and the top of a
parabola through it and its neighbours, is next to the minimum.

Axes: B rows, T positions, D model width, V vocabulary, C positions of a chunk, K gains.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.growth.forward import Pass
from mtp_jax.growth.text import FitText
from mtp_jax.loss.targets import future_targets
from mtp_jax.model.language_model import model_builder
from mtp_jax.model.layers import unembed

_GAINS = np.concatenate([[0.0], np.geomspace(0.05, 2.0, 12)])
_TOKENS = 8192  # of the text; one number a head needs no more
_CHUNK = 32  # positions: with few, reading the unembedding would be most of the time


def best_gains(cfg: ModelConfig, params: Any, text: FitText, first: int) -> np.ndarray:
    """The gain of least loss of each head from number `first` on, counted from 0."""
    _, build = model_builder(cfg)

    @jax.jit
    def add(params: Any, batch: dict[str, jax.Array]):
        batch = {name: x[0] for name, x in batch.items()}
        run = Pass.over(build(params), batch)
        return [_losses(run, head) for head in range(first, cfg.n_future_tokens)]

    total = np.zeros((cfg.n_future_tokens - first, len(_GAINS)))
    read = 0
    for batch in text.batches():
        total += np.asarray(jax.device_get(add(params, batch)), np.float64)
        read += batch["tokens"].size
        if read >= _TOKENS:
            break
    return np.array([_lowest(losses) for losses in total])


def _losses(run: Pass, head: int) -> jax.Array:
    """The sum of a head's losses with each gain, float32 [K]."""
    cfg = run.cfg
    target_NBT, valid_NBT = future_targets(
        run.batch["tokens"], run.batch["segments"], cfg.n_future_tokens
    )
    hidden_BTD, bias_BTr = run.hidden(head), run.bias_rows(head)
    weights = run.weights(head)
    table_VD = jax.sharding.reshard(weights.unembedding, jax.P(None, None))
    bias_Vr = weights.markov_out
    if bias_Vr is not None:
        bias_Vr = jax.sharding.reshard(bias_Vr, jax.P(None, None))
    dtype = hidden_BTD.dtype

    def one(total_K: jax.Array, of: Any):
        hidden_CBD, bias_CBr, target_CB, valid_CB = of
        logits_CBV = unembed(hidden_CBD, table_VD.astype(dtype))
        ids_11V = jnp.arange(logits_CBV.shape[2])[None, None]
        is_target_CBV = ids_11V == target_CB[..., None]
        beside_CBV = jnp.zeros_like(logits_CBV)
        if bias_CBr is not None and bias_Vr is not None:
            beside_CBV = unembed(bias_CBr, bias_Vr.astype(dtype))

        def loss(gain: jax.Array) -> jax.Array:
            z_CBV = gain * logits_CBV + beside_CBV
            own_CB = jnp.sum(jnp.where(is_target_CBV, z_CBV, 0.0), axis=2)
            return jnp.sum((jax.nn.logsumexp(z_CBV, axis=2) - own_CB) * valid_CB)

        found_K = jax.lax.map(loss, jnp.asarray(_GAINS, jnp.float32))
        return total_K + found_K, None

    moved = [
        None if x is None else _chunks(jnp.moveaxis(x, 1, 0))
        for x in (hidden_BTD, bias_BTr, target_NBT[head], valid_NBT[head])
    ]
    zero_K = jnp.zeros(len(_GAINS), jnp.float32)
    return jax.lax.scan(one, zero_K, tuple(moved))[0]


def _chunks(x_TBX: jax.Array) -> jax.Array:
    """Positions in chunks, the last one filled up with zeros: [T / C, C, B, ...]."""
    t = x_TBX.shape[0]
    size = min(_CHUNK, t)
    ends = [(0, -t % size)] + [(0, 0)] * (x_TBX.ndim - 1)
    return jnp.pad(x_TBX, ends).reshape(-1, size, *x_TBX.shape[1:])


def _lowest(losses_K: np.ndarray) -> float:
    """The gain at the bottom of a parabola through the least of the losses."""
    best = int(np.argmin(losses_K))
    if best in (0, len(losses_K) - 1):
        return float(_GAINS[best])
    near = slice(best - 1, best + 2)
    a, b, _ = np.polyfit(_GAINS[near], losses_K[near], 2)
    return float(np.clip(-b / (2 * a), *_GAINS[[best - 1, best + 1]]))
