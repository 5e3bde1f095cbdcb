"""Models that get heads, text that these are fitted to, and what they then say."""

import copy
import dataclasses

import jax
import numpy as np
import scipy.special
from models import TINY, placed_batch, placed_params, random_params

from mtp_jax.checkpoint.restore import Restored
from mtp_jax.config import Config, DataConfig, HeadsConfig
from mtp_jax.config.regrow import regrown_config
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.eval.outputs import head_outputs
from mtp_jax.growth.starts import started

ONE = dataclasses.replace(TINY, num_layers=4, n_future_tokens=1)
T, V = 24, TINY.vocab_size


def heads_of(**fields):
    return HeadsConfig(**({"norm": "own"} | fields))


class Text:
    """Rows of a chain in which the next token is often the last one plus 1 or 2."""

    def __init__(self, model, rows=8, batches=3):
        self.config = Config(model=model)
        rng = np.random.default_rng(5)
        s = T + model.n_future_tokens
        steps = rng.choice([1, 2, 7], p=[0.6, 0.3, 0.1], size=(batches, rows, s))
        self.tokens = (np.cumsum(steps, axis=2) % V).astype(np.int32)
        self.segments = np.ones_like(self.tokens)
        self.segments[:, 0, 9:] = 2
        self.segments[:, 1, -5:] = 0

    def parted(self):
        parts = copy.copy(self), copy.copy(self)
        for part, at in zip(parts, (slice(0, -1), slice(-1, None)), strict=True):
            part.tokens, part.segments = self.tokens[at], self.segments[at]
        return parts

    def rows(self):
        for tokens, segments in zip(self.tokens, self.segments, strict=True):
            starts = np.diff(segments, prepend=0, axis=1) != 0
            index = np.arange(segments.shape[1])
            first = np.maximum.accumulate(np.where(starts, index, 0), axis=1)
            positions = (index - first).astype(np.int32)
            yield {"tokens": tokens, "segments": segments, "positions": positions}

    def batches(self):
        for rows in self.rows():
            yield placed_batch(rows, 1)


def grown_of(before, n, start, heads, seed=0, text=True):
    """Config and parameters of a model grown from random ones; the mesh is set."""
    params = placed_params(before, random_params(before, seed))
    after = regrown_config(before, n, heads)
    return params, after, started(before, after, params, start, Text(after), 3)


def outputs(cfg, params, tokens, segments):
    """Hidden states and logits of every head, NumPy."""
    config = Config(model=cfg, data=DataConfig(sources=("corpus",)))
    mesh = jax.sharding.get_mesh()
    model = Restored(config, params, mesh, 0, ByteTokenizer())
    return [np.asarray(x) for x in head_outputs(model, tokens, segments)]


def losses(cfg, params, text):
    """The mean loss of each head on all rows, by the logits, float64."""
    n, total, count = cfg.n_future_tokens, 0.0, 0.0
    for rows in text.rows():
        tokens, segments = rows["tokens"], rows["segments"]
        _, logits_NBTV = outputs(cfg, params, tokens, segments)
        nll, valid = of_targets(logits_NBTV[:, :, :T].astype(float), rows, n)
        total += (nll * valid).sum((1, 2))
        count += valid.sum((1, 2))
    return total / count


def of_targets(logits_NBTV, rows, n):
    tokens, segments = rows["tokens"], rows["segments"]
    target = np.stack([tokens[:, i : i + T] for i in range(1, n + 1)])
    there = np.stack([segments[:, i : i + T] for i in range(1, n + 1)])
    valid = (there == segments[None, :, :T]) & (there > 0)
    own = np.take_along_axis(logits_NBTV, target[..., None], -1)[..., 0]
    return scipy.special.logsumexp(logits_NBTV, axis=-1) - own, valid
