"""Small models trained on rows that are made as they are needed, in this process.

Axes: R rows, S = T + N tokens of a row.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.parallel.sharding import make_mesh
from mtp_jax.training.batches import batch_of
from mtp_jax.training.train_step import make_init, make_step

# Tokens and document numbers of a step's rows, int [R, S] each.
MakeRows = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


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
            state, _ = step(state, batch_of(*make_rows(rng)))
    config = dataclasses.replace(cfg, mesh=Config().mesh)
    return Restored(config, state.params, mesh, cfg.train.steps, ByteTokenizer())


def padded(tokens_RT: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one document each and n tokens of padding, tokens and segments [R, S].

    So every position of a row is trained, whatever n is.
    """
    pad = ((0, 0), (0, n))
    return np.pad(tokens_RT, pad), np.pad(np.ones_like(tokens_RT), pad)
