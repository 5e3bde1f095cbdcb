"""Hidden states and logits of every head for given tokens, as training has them.

Axes: B rows, T tokens of a row, N heads, D model width, V vocabulary.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from mtp_jax.checkpoint.restore import Restored, as_restored
from mtp_jax.config import ModelConfig
from mtp_jax.data.positions import positions_of
from mtp_jax.errors import UserError
from mtp_jax.model.attention import RowContext
from mtp_jax.model.heads.walk import HeadRunner, all_hidden, tokens_before
from mtp_jax.model.language_model import model_builder, run_trunk
from mtp_jax.parallel.processes import compile_on_all
from mtp_jax.parallel.sharding import batch_shards, spec


class HeadOutputs(NamedTuple):
    """Outputs of all heads at all positions; head i + 1 predicts token t + i + 1."""

    hidden_NBTD: jax.Array  # after the last norm, in the compute dtype
    logits_NBTV: jax.Array  # float32


def head_outputs(
    model: Restored | str | os.PathLike[str],
    tokens_BT: ArrayLike,
    segments_BT: ArrayLike | None = None,
) -> HeadOutputs:
    """Hidden states and logits of every head, by the forward pass of training.

    All of them are in memory at once: the logits of B T positions take 4 N B T V bytes,
    which is 2 GiB for four heads, 4096 positions and 32,000 tokens. Every new shape is
    compiled anew. A text begins with `tokenizer.bos_id`, as in training. Heads that
    read tokens after their position read those of the row, and 0 after its end.

    Args:
      model: a restored model, or the workdir of a run, which is then read at each call.
      tokens_BT: token ids, integers.
      segments_BT: document number of each token, 0 in padding; None: every row is one
        document. A position sees its own document alone.

    Returns:
      `hidden_NBTD`, in the compute dtype, ready for the output matrix, and
      `logits_NBTV`, float32; on the devices of `model.mesh`.

    Raises:
      UserError: no rows of tokens, ids that the model does not know, or other segments
        than tokens.
    """
    restored = as_restored(model)
    tokens, segments = _rows(restored.config.model, tokens_BT, segments_BT)
    b, shards = len(tokens), batch_shards(restored.mesh)
    rows = (tokens, segments, positions_of(segments))
    with jax.set_mesh(restored.mesh):
        sharding = jax.NamedSharding(restored.mesh, spec("batch", None))
        # The last row is read again until the devices have equally many.
        spare = ((0, -b % shards), (0, 0))
        placed = [jax.device_put(np.pad(x, spare, mode="edge"), sharding) for x in rows]
        forward = _forward(restored.config.model)
        if jax.process_count() > 1:
            compile_on_all(forward, restored.params, *placed)
        outputs = forward(restored.params, *placed)
        return outputs if b % shards == 0 else _first_rows(outputs, b)


def _first_rows(outputs: HeadOutputs, b: int) -> HeadOutputs:
    """The outputs of the first rows alone, which every device then has."""
    whole_NBTD = jax.sharding.reshard(outputs.hidden_NBTD, spec(None, None, None, None))
    by_vocab = spec(None, None, None, "vocab")
    whole_NBTV = jax.sharding.reshard(outputs.logits_NBTV, by_vocab)
    return HeadOutputs(whole_NBTD[:, :b], whole_NBTV[:, :b])


def _rows(
    cfg: ModelConfig, tokens: ArrayLike, segments: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and document numbers as int32 [B, T], checked."""
    tokens_BT = np.asarray(tokens)
    if tokens_BT.ndim != 2 or tokens_BT.size == 0 or tokens_BT.dtype.kind not in "iu":
        raise UserError(
            f"tokens have shape {tokens_BT.shape} and dtype {tokens_BT.dtype}; give "
            "rows of integers, [B, T]."
        )
    if not 0 <= tokens_BT.min() <= tokens_BT.max() < cfg.vocab_size:
        raise UserError(
            f"tokens are from {tokens_BT.min()} to {tokens_BT.max()}; the model knows "
            f"0 to {cfg.vocab_size - 1}."
        )
    segments_BT = np.ones_like(tokens_BT) if segments is None else np.asarray(segments)
    if segments_BT.shape != tokens_BT.shape:
        raise UserError(
            f"segments have shape {segments_BT.shape}, tokens {tokens_BT.shape}; give "
            "a number a token."
        )
    return tokens_BT.astype(np.int32), segments_BT.astype(np.int32)


@functools.cache
def _forward(cfg: ModelConfig) -> Callable[..., HeadOutputs]:
    """`f(params, tokens_BT, segments_BT, positions_BT)`, jitted."""
    _, build = model_builder(cfg)

    @jax.jit
    def forward(params: Any, tokens_BT, segments_BT, positions_BT) -> HeadOutputs:
        model = build(params)
        rows = RowContext(model.angles(positions_BT), segments_BT)
        trunk_BTD = run_trunk(model, model.embed(tokens_BT), rows, "auto")
        before_NBT = tokens_before(cfg, tokens_BT)
        runner = HeadRunner(cfg, rows, "auto")
        return HeadOutputs(*all_hidden(runner, model.parts(trunk_BTD), before_NBT))

    return forward
