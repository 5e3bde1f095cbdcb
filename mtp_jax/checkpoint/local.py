"""Fast checkpoints on the disks of the hosts themselves, beside the durable ones.

Each process writes the shards of its own devices to `config.checkpoint.local_dir`, in
the background, and keeps the newest two. They are of use to a restart of the same
processes on the same hosts and mesh; whatever else happens, the durable ones remain.
"""

import concurrent.futures
import hashlib
import pathlib
import pickle
import shutil
from typing import Any

import jax
import numpy as np

from mtp_jax.config import CheckpointConfig

_KEPT = 2
_NONE = -1


class LocalCheckpoints:
    """Those of one process of one run."""

    def __init__(self, cfg: CheckpointConfig, run: str, setting: str):
        """Opens them; those of another number of processes are deleted.

        Args:
          cfg: where, and how often.
          run: which one they belong to.
          setting: what must be the same at a restart: model and mesh.
        """
        count = f"-of-{jax.process_count()}"
        parent = pathlib.Path(cfg.local_dir).expanduser() / run
        self._folder = parent / f"{jax.process_index()}{count}"
        for other in parent.glob("*-of-*"):
            if not other.name.endswith(count):
                shutil.rmtree(other, ignore_errors=True)
        self._every = cfg.local_every
        self._setting = setting
        self._writer = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future | None = None

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved."""
        return step % self._every == 0

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Copies the shards off the devices, and begins to write them.

        Raises:
          OSError: the save before this one failed.
        """
        self.wait()
        shards = [_shards_of(x) for x in jax.tree.leaves(state)]
        content = {"setting": self._setting, "about": about, "shards": shards}
        self._pending = self._writer.submit(self._write, step, content)

    def wait(self) -> None:
        """Waits until the last save is on the disk; its failure is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self, after: int) -> int:
        """The newest step after `after` that all hosts have whole; else `after`.

        All processes must call it.
        """
        from jax.experimental import multihost_utils

        steps = sorted((s for s in self._steps() if s > after), reverse=True)[:_KEPT]
        whole = [s for s in steps if self._read(s) is not None]
        mine = np.array((whole + [_NONE] * _KEPT)[:_KEPT], np.int32)
        of_all = multihost_utils.process_allgather(mine).reshape(-1, _KEPT)
        common = set.intersection(*(set(row.tolist()) for row in of_all)) - {_NONE}
        return max(common, default=after)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a step that `newest` gave, and what was said about it.

        Args:
          step: which.
          abstract: tree of `jax.ShapeDtypeStruct` with shardings.
        """
        content = self._read(step)
        assert content is not None, step
        leaves, tree = jax.tree.flatten(abstract)
        pairs = zip(leaves, content["shards"], strict=True)
        return jax.tree.unflatten(tree, [_array(*p) for p in pairs]), content["about"]

    def drop_after(self, step: int) -> None:
        """Forgets those that a restart at `step` did not take."""
        for other in self._steps():
            if other > step:
                shutil.rmtree(self._folder / str(other), ignore_errors=True)

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        names = (path.name for path in self._folder.iterdir())
        return sorted(int(name) for name in names if name.isdecimal())

    def _write(self, step: int, content: dict[str, Any]) -> None:
        part, target = self._folder / f".{step}", self._folder / str(step)
        part.mkdir(parents=True, exist_ok=True)
        with (part / "shards").open("wb") as file:
            pickle.dump(content, file, protocol=5)
        (part / "sha256").write_text(_sha256(part / "shards"))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in self._steps()[:-_KEPT]:
            shutil.rmtree(self._folder / str(old), ignore_errors=True)

    def _read(self, step: int) -> dict[str, Any] | None:
        """The content, if it is whole and of the same setting."""
        folder = self._folder / str(step)
        try:
            if _sha256(folder / "shards") != (folder / "sha256").read_text():
                return None
            with (folder / "shards").open("rb") as file:
                content = pickle.load(file)
            return content if content["setting"] == self._setting else None
        except Exception:  # missing, altered, or of another version of a library
            return None


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards_of(x: jax.Array) -> dict[Any, np.ndarray]:
    """Index to data, of the shards on this process's devices, each once."""
    return {
        _key(shard.index, x.shape): np.asarray(shard.data)
        for shard in x.addressable_shards
    }


def _array(of: jax.ShapeDtypeStruct, shards: dict[Any, np.ndarray]) -> jax.Array:
    def local(index: tuple[slice, ...] | None) -> np.ndarray:
        return shards[_key(index or (), of.shape)]

    assert of.sharding is not None
    return jax.make_array_from_callback(of.shape, of.sharding, local)


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
