"""Training text for fits: the first rows of the corpora, on the devices.

Axes: B rows, S tokens of a row.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.batches import different_rows, train_batches
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
    part: tuple[int, int] | None = None  # from which of its batches to before which

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """Batches of tokens, segments and positions, int32 [1, B, S]."""
        cfg = _plain(self.config, self.mesh)
        size = cfg.data.batch_size
        sharding = batch_sharding(self.mesh)
        rows = rows_of_process(sharding, size)
        for batch in self._of_host(cfg, rows):
            placed = place_rows(batch, rows, sharding, size)
            yield {name: placed[name] for name in ("tokens", "segments", "positions")}

    def parted(self) -> tuple["FitText", "FitText"]:
        """Its batches but for the last eighth, and those, which are kept apart.

        Of a text that is read more than once they are those of the first time. A single
        batch is both.
        """
        begin, end = self._range()
        cfg = _plain(self.config, self.mesh)
        end = min(end, different_rows(cfg, self.corpora) // cfg.data.batch_size)
        count = end - begin
        if count < 2:
            return self, self
        at = end - max(1, count // 8)
        parts = (begin, at), (at, end)
        fit, apart = (dataclasses.replace(self, part=part) for part in parts)
        return fit, apart

    def rows(self) -> Iterator[dict[str, np.ndarray]]:
        """The whole batches on every host, [B, S]."""
        cfg = _plain(self.config, self.mesh)
        yield from self._of_host(cfg, np.arange(cfg.data.batch_size))

    def _of_host(self, cfg: Config, rows: np.ndarray) -> Iterator[dict]:
        begin, end = self._range()
        batches = train_batches(cfg, rows, begin, self.corpora)
        return itertools.islice(batches, end - begin)

    def _range(self) -> tuple[int, int]:
        if self.part is not None:
            return self.part
        data = _plain(self.config, self.mesh).data
        return 0, -(-self.tokens // (data.batch_size * data.seq_len))


def _plain(cfg: Config, mesh: jax.sharding.Mesh) -> Config:
    """A config whose batches are microbatches of its own, without reader processes."""
    shards = batch_shards(mesh)
    size = -(-cfg.data.batch_size // cfg.train.accumulation // shards) * shards
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, batch_size=size, workers=0),
        train=dataclasses.replace(cfg.train, accumulation=1),
    )
