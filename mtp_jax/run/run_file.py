"""The file that makes a folder a run, `run.json`.

It holds the config, each time the run was started (`history`), and where its time went.
"""

import dataclasses
import itertools
import time
from typing import Any

import jax
from etils import epath

from mtp_jax.config import Config, config_to_json
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.tokenizer import tokenizer_identity
from mtp_jax.run.environment import environment
from mtp_jax.run.goodput import Goodput
from mtp_jax.run.history import read_history, starts_with_configs
from mtp_jax.storage import write_json

_WRITE_EVERY_S = 30.0  # a workdir may be far away
# Batches follow from these; `audit` reads them for each start.
_DATA_FIELDS = ("sources", "weights", "seq_len", "batch_size", "seed")


class RunFile:
    """The file `run.json` of a run; only process 0 writes it."""

    def __init__(self, workdir: epath.Path, goodput: Goodput, content: dict[str, Any]):
        self._path = workdir / "run.json"
        self._goodput = goodput
        self._content = content
        self._active = jax.process_index() == 0
        self._written = 0.0

    @classmethod
    def begin(
        cls,
        cfg: Config,
        workdir: epath.Path,
        mesh: jax.sharding.Mesh,
        corpora: list[Corpus],
        *,
        start: int,
        rows: int,
        goodput: Goodput,
        spent: dict[str, float],
    ) -> "RunFile":
        """Adds a start to the file, which need not be there yet.

        Args:
          cfg: the config of this start.
          workdir: the folder of the run.
          mesh: the mesh of this start.
          corpora: the corpora of this start, opened.
          start: steps done before.
          rows: rows consumed before.
          goodput: of this process; it goes on with the time that the file tells.
          spent: `Goodput.seconds` when the checkpoint of step `start` was saved.
        """
        before = read_history(workdir)
        goodput.go_on(spent, before.get("goodput"))
        data = dataclasses.asdict(cfg.data)
        entry = {
            "after": start,
            "rows": rows,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "data": {name: data[name] for name in _DATA_FIELDS},
            "corpora": [corpus.fingerprint for corpus in corpora],
        }
        config = config_to_json(cfg)
        content = {
            "config": config,
            "tokenizer": tokenizer_identity(corpora[0].tokenizer),
            **environment(mesh),
            "runs": _with_start(before, entry, config),
        }
        file = cls(workdir, goodput, content)
        file.write()
        return file

    def write(self, finished: bool = False) -> None:
        """Writes the file, with the time up to now."""
        if self._active:
            state = self._goodput.state(finished)
            write_json(self._path, {**self._content, "goodput": state})
            self._written = time.monotonic()

    def write_sometimes(self) -> None:
        """Writes the file if it was last written more than 30 seconds ago."""
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            self.write()


def _with_start(
    before: dict[str, Any], entry: dict[str, Any], config: dict[str, Any]
) -> list[dict[str, Any]]:
    """The starts of a run and a new one; a config is written where it differs."""
    starts = [*starts_with_configs(before), {**entry, "config": config}]
    for last, start in reversed(list(itertools.pairwise(starts))):
        if start["config"] in (None, last["config"]):
            del start["config"]
    if starts[0]["config"] is None:
        del starts[0]["config"]
    return starts
