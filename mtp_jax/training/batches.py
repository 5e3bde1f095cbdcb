"""Batches of a training step from rows of tokens of your own.

Axes: R rows of a global batch, A microbatches, M = R / A rows of a microbatch,
S = T + N tokens of a row: T positions, and N more for the heads' targets.
"""

import jax
import numpy as np
from numpy.typing import ArrayLike

from mtp_jax.data.packing import row_hash
from mtp_jax.data.positions import positions_of
from mtp_jax.errors import UserError
from mtp_jax.parallel.to_devices import batch_sharding, place_rows, rows_of_process


def batch_of(
    tokens_RS: ArrayLike,
    segments_RS: ArrayLike | None = None,
    *,
    learned_RS: ArrayLike | None = None,
    accumulation: int = 1,
) -> dict[str, jax.Array]:
    """A global batch for `make_step`, on the devices of the mesh that is set.

    Every process gives all rows, and places those that its devices hold.

    Args:
      tokens_RS: token ids, integers; rows of `Config.row_len` tokens.
      segments_RS: document number of each token, 0 in padding; None: every row is one
        document. Positions count from 0 in each document.
      learned_RS: 1 for tokens that count as targets, 0 for those that are only read;
        None: all count.
      accumulation: A, microbatches that the step runs one after another; as in
        `config.train.accumulation`.

    Returns:
      tokens, segments and positions, int32 [A, M, S], and hash, uint32 [A, M, 2]; with
      `learned_RS` also learned, int32 [A, M, S].

    Raises:
      UserError: no rows of integers, other segments than tokens, or rows that do not
        split evenly over microbatches and devices.
    """
    tokens = np.asarray(tokens_RS)
    if tokens.ndim != 2 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise UserError(
            f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; give rows of "
            "integers, [R, S]."
        )
    segments = np.ones_like(tokens) if segments_RS is None else np.asarray(segments_RS)
    if segments.shape != tokens.shape:
        raise UserError(
            f"segments have shape {segments.shape}, tokens {tokens.shape}; give a "
            "number a token."
        )
    learned = None if learned_RS is None else np.asarray(learned_RS)
    if learned is not None and learned.shape != tokens.shape:
        raise UserError(
            f"learned has shape {learned.shape}, tokens {tokens.shape}; give a number "
            "a token."
        )
    size = len(tokens)
    if accumulation < 1 or size % accumulation:
        raise UserError(f"{size} rows do not split into {accumulation} microbatches.")
    arrays = {
        "tokens": tokens.astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": positions_of(segments),
    }
    if learned is not None:
        arrays["learned"] = (learned != 0).astype(np.int32)
    sharding = batch_sharding(jax.sharding.get_mesh())
    rows = rows_of_process(sharding, size, accumulation)
    batch = {name: x_RS[rows] for name, x_RS in arrays.items()}
    named = [{name: x[i] for name, x in batch.items()} for i in range(len(rows))]
    hashes = [row_hash(row, int(r)) for row, r in zip(named, rows, strict=True)]
    batch["hash"] = np.stack(hashes)
    return place_rows(batch, rows, sharding, size, accumulation)
