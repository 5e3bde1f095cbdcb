"""Training text for fits: the first rows of the corpora, on the devices.

Axes: B rows, S tokens of a row.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.batches import train_batches
from mtp_jax.data.corpus import Corpus
from mtp_jax.parallel.sharding import batch_shards
from mtp_jax.parallel.to_devices import batch_sharding, place_rows, rows_of_process


@dataclasses.dataclass(frozen=True)
class FitText:
    """Rows that are read again by each pass of a fit."""

    config: Config  # of the grown model
    corpora: list[Corpus]
    mesh: jax.sharding.Mesh
    tokens: int  # at the least, in all rows

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """Batches of tokens, segments and positions, int32 [1, B, S]."""
        cfg = _plain(self.config, self.mesh)
        size = cfg.data.batch_size
        sharding = batch_sharding(self.mesh)
        rows = rows_of_process(sharding, size)
        for batch in self._of_host(cfg, rows):
            placed = place_rows(batch, rows, sharding, size)
            yield {name: placed[name] for name in ("tokens", "segments", "positions")}

    def rows(self) -> Iterator[dict[str, np.ndarray]]:
        """The whole batches on every host, [B, S]."""
        cfg = _plain(self.config, self.mesh)
        yield from self._of_host(cfg, np.arange(cfg.data.batch_size))

    def _of_host(self, cfg: Config, rows: np.ndarray) -> Iterator[dict]:
        count = -(-self.tokens // (cfg.data.batch_size * cfg.data.seq_len))
        return itertools.islice(train_batches(cfg, rows, 0, self.corpora), count)


def _plain(cfg: Config, mesh: jax.sharding.Mesh) -> Config:
    """A config whose batches are microbatches of its own, without reader processes."""
    shards = batch_shards(mesh)
    size = -(-cfg.data.batch_size // cfg.train.accumulation // shards) * shards
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, batch_size=size, workers=0),
        train=dataclasses.replace(cfg.train, accumulation=1),
    )
