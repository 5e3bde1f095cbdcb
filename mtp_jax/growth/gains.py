"""Numbers by which a start's logits are multiplied, by its loss.

Each head has one, the gain; and where a bias by the token before is new, that has one
for all heads. The loss is convex in them. So of a few gains the best, and the top of a
parabola through it and its neighbours, is next to the minimum.

Axes: B rows, T positions, D model width, V vocabulary, C positions of a chunk, K gains,
S scales of the bias.
"""

import dataclasses
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
from mtp_jax.parallel.processes import of_first

_GAINS = np.concatenate([[0.0], np.geomspace(0.05, 2.0, 12)])
_SCALES = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_TOKENS = 8192  # of the text, over scales; one number a head needs no more
_CHUNK = 32  # positions: with few, reading the unembedding would be most of the time


@dataclasses.dataclass(frozen=True)
class Gains:
    """Numbers that multiply logits, and the loss that the heads then have."""

    of_heads: np.ndarray  # of each, float64
    of_bias: float
    loss: float  # nats a token, the sum over heads


def best_gains(
    cfg: ModelConfig, params: Any, text: FitText, first: int, of_bias: bool = False
) -> Gains:
    """The gains of least loss of heads from number `first` on, counted from 0.

    Args:
      cfg: the model.
      params: of it, on the mesh that is set.
      text: on which the loss is measured.
      first: of the heads.
      of_bias: the bias by the token before gets a number, too; else it stays.
    """
    _, build = model_builder(cfg)
    scales = _SCALES if of_bias else np.ones(1)
    heads = range(first, cfg.n_future_tokens)

    @jax.jit
    def add(params: Any, batch: dict[str, jax.Array]):
        batch = {name: x[0] for name, x in batch.items()}
        run = Pass.over(build(params), batch)
        return [_losses(run, head, scales) for head in heads]

    total_NSK = np.zeros((len(heads), len(scales), len(_GAINS)))
    count_N = np.zeros(len(heads))
    read = 0
    for batch in text.batches():
        for i, (loss_SK, count) in enumerate(jax.device_get(add(params, batch))):
            total_NSK[i] += loss_SK
            count_N[i] += count
        read += batch["tokens"].size
        if read * len(scales) >= _TOKENS:
            break
    total_NSK, count_N = of_first((total_NSK, count_N))
    mean_NSK = total_NSK / np.maximum(count_N, 1.0)[:, None, None]
    best_S = mean_NSK.min(axis=2).sum(axis=0)
    at = int(np.argmin(best_S))
    gain_N = np.array([_lowest(loss_SK[at]) for loss_SK in mean_NSK])
    return Gains(gain_N, float(scales[at]), float(best_S[at]))


def _losses(run: Pass, head: int, scales: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Sums of a head's losses, float32 [S, K], and how many tokens they are of."""
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

    both = np.stack(np.meshgrid(scales, _GAINS, indexing="ij"), -1).reshape(-1, 2)

    def one(total: jax.Array, of: Any):
        hidden_CBD, bias_CBr, target_CB, valid_CB = of
        logits_CBV = unembed(hidden_CBD, table_VD.astype(dtype))
        ids_11V = jnp.arange(logits_CBV.shape[2])[None, None]
        is_target_CBV = ids_11V == target_CB[..., None]
        beside_CBV = jnp.zeros_like(logits_CBV)
        if bias_CBr is not None and bias_Vr is not None:
            beside_CBV = unembed(bias_CBr, bias_Vr.astype(dtype))

        def loss(of: jax.Array) -> jax.Array:
            z_CBV = of[1] * logits_CBV + of[0] * beside_CBV
            own_CB = jnp.sum(jnp.where(is_target_CBV, z_CBV, 0.0), axis=2)
            return jnp.sum((jax.nn.logsumexp(z_CBV, axis=2) - own_CB) * valid_CB)

        return total + jax.lax.map(loss, jnp.asarray(both, jnp.float32)), None

    moved = [
        None if x is None else _chunks(jnp.moveaxis(x, 1, 0))
        for x in (hidden_BTD, bias_BTr, target_NBT[head], valid_NBT[head])
    ]
    zero = jnp.zeros(len(both), jnp.float32)
    found = jax.lax.scan(one, zero, tuple(moved))[0]
    return found.reshape(len(scales), -1), jnp.sum(valid_NBT[head])


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
