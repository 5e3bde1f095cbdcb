"""Small models trained on rows that are made as they are needed, in this process.

Axes: R rows, S = T + N tokens of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.parallel.sharding import make_mesh
from mtp_jax.training.batches import batch_of
from mtp_jax.training.train_step import make_init, make_step


class Rows(NamedTuple):
    """The rows of a step, int [R, S] each, as `batch_of` takes them."""

    tokens: np.ndarray
    segments: np.ndarray  # document numbers, 0 in padding
    learned: np.ndarray | None = None  # 1 for tokens that count as targets; None: all


MakeRows = Callable[[np.random.Generator], Rows]


def fit(cfg: Config, make_rows: MakeRows, seed: int) -> Restored:
    """A model trained for `cfg.train.steps` steps on one device.

    Args:
      cfg: the run; its data is not read.
      make_rows: from a generator of random numbers to the rows of a step; asked in the
        same order with the same generator for every config, so arms see equal data.
      seed: of the parameters and of that generator.

    Returns:
      The model; its tokenizer stands for none.
    """
    mesh = make_mesh(Config().mesh, jax.devices()[:1])
    rng = np.random.default_rng([seed, 7])
    with jax.set_mesh(mesh):
        state, step = make_init(cfg)(jax.random.key(seed)), make_step(cfg)
        for _ in range(cfg.train.steps):
            rows = make_rows(rng)
            batch = batch_of(rows.tokens, rows.segments, learned_RS=rows.learned)
            state, _ = step(state, batch)
    config = dataclasses.replace(cfg, mesh=Config().mesh)
    return Restored(config, state.params, mesh, cfg.train.steps, ByteTokenizer())


def padded(tokens_RT: np.ndarray, n: int, learned_RT: np.ndarray | None = None) -> Rows:
    """Rows as one document each and n tokens of padding.

    So every position of a row is trained, whatever n is.
    """
    pad = ((0, 0), (0, n))
    learned = None if learned_RT is None else np.pad(learned_RT, pad)
    return Rows(np.pad(tokens_RT, pad), np.pad(np.ones_like(tokens_RT), pad), learned)
