"""`run.json`: what a run is, each time it was started, and where its time went."""

import dataclasses
import fcntl
import json
import os
import socket
import time
import uuid
from typing import Any, TextIO

import jax
from etils import epath

from mtp_jax.config import Config
from mtp_jax.data.corpus import Corpus
from mtp_jax.data.tokenizer import tokenizer_identity
from mtp_jax.errors import UserError
from mtp_jax.run.goodput import Goodput
from mtp_jax.run.run_log import environment
from mtp_jax.storage import is_remote, write_atomically, write_json

_WRITE_EVERY_S = 30.0  # a workdir may be far away
# What decides on the batches; `audit` reads them for each start.
_DATA_FIELDS = ("sources", "weights", "seq_len", "batch_size", "seed")


class RunFile:
    """The file; only process 0 writes."""

    def __init__(self, workdir: epath.Path, goodput: Goodput, content: dict[str, Any]):
        self._path = workdir / "run.json"
        self.goodput = goodput
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
        start: int,
        goodput: Goodput,
        spent: dict[str, float],
    ) -> "RunFile":
        """Adds a start to the file.

        Args:
          cfg: of this start.
          workdir: of the run.
          mesh: of this start.
          corpora: of this start.
          start: steps done before.
          goodput: goes on with what the file says of the time so far.
          spent: `Goodput.seconds` when the checkpoint of step `start` was saved.
        """
        before = _read(workdir / "run.json")
        goodput.go_on(spent, before.get("goodput"))
        data = dataclasses.asdict(cfg.data)
        entry = {
            "after": start,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "data": {name: data[name] for name in _DATA_FIELDS},
            "corpora": [corpus.fingerprint for corpus in corpora],
        }
        content = {
            "config": dataclasses.asdict(cfg),
            "tokenizer": tokenizer_identity(corpora[0].tokenizer),
            **environment(mesh),
            "runs": [*before.get("runs", []), entry],
        }
        file = cls(workdir, goodput, content)
        file.write()
        return file

    def write(self, finished: bool = False) -> None:
        """Writes it, with the time up to now."""
        if self._active:
            state = self.goodput.state(finished)
            write_json(self._path, {**self._content, "goodput": state})
            self._written = time.monotonic()

    def write_sometimes(self) -> None:
        """Writes it if that was not done for a while."""
        if time.monotonic() - self._written > _WRITE_EVERY_S:
            self.write()


def _read(path: epath.Path) -> dict[str, Any]:
    """What is there; empty where nothing is, or nothing that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def identity(workdir: epath.Path) -> str:
    """Of the run in a locked workdir: another one if the folder is made again."""
    return (workdir / ".id").read_text(encoding="utf-8").strip()


def lock(workdir: epath.Path) -> TextIO | None:
    """Keeps other runs out of a workdir until this process ends, however it ends.

    Of a file system: one that many hosts share must know locks (NFS 4 and Lustre do).
    Object stores have none, and none is taken there.

    Returns:
      The open file; the lock lasts as long as it. None: there is no lock.

    Raises:
      UserError: another process holds it.
    """
    path, here = workdir / ".lock", f"process {os.getpid()} on {socket.gethostname()}\n"
    if is_remote(path):
        path.write_text(here)
        _write_identity(workdir)
        return None
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held as the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(
            f"--workdir={workdir} is in use by {holder}; wait until it ends, or "
            "choose another workdir."
        ) from None
    except OSError:
        pass  # a file system without locks
    _write_identity(workdir)
    file.truncate(0)
    file.write(here)
    file.flush()
    return file


def _write_identity(workdir: epath.Path) -> None:
    path = workdir / ".id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12] + "\n")
