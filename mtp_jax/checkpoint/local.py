"""Fast checkpoints on the disks of the hosts themselves, beside the durable ones.

Each process writes the shards of its own devices to `config.checkpoint.local_dir`, in
the background, and keeps the newest two. They are of use to a restart of the same
processes on the same hosts and mesh; whatever else happens, the durable ones remain.

The folders are closed to other users, and nothing is read from folders of others.
"""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import shutil
import stat
from typing import Any

import jax
import numpy as np

from mtp_jax.checkpoint.shard_file import Contents, Index, Leaf, read, write
from mtp_jax.config import CheckpointConfig

_KEPT = 2
_NONE = -1
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class LocalCheckpoints:
    """The local checkpoints of one process of one run."""

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
        """Returns True if the state after `step` is to be saved."""
        return step % self._every == 0

    def save(self, step: int, state: Any, about: dict[str, float]) -> None:
        """Copies the shards off the devices, and begins to write them.

        Args:
          step: steps done.
          state: tree of arrays.
          about: finite numbers that `restore` returns with the state.

        Raises:
          OSError: the save before this one failed.
        """
        self.wait()
        leaves = [_local_shards(x) for x in jax.tree.leaves(state)]
        contents = Contents(self._setting, about, leaves)
        self._pending = self._writer.submit(self._write, step, contents)

    def wait(self) -> None:
        """Waits until the last save is on the disk; its failure is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self, after: int, abstract: Any) -> int:
        """The newest step after `after` that all hosts have whole; else `after`.

        All processes must call it.

        Args:
          after: steps up to this one are not looked at.
          abstract: tree of `jax.ShapeDtypeStruct` with shardings, to be restored.
        """
        from jax.experimental import multihost_utils

        steps = sorted((s for s in self._steps() if s > after), reverse=True)[:_KEPT]
        whole = [s for s in steps if self._read(s, abstract) is not None]
        mine = np.array((whole + [_NONE] * _KEPT)[:_KEPT], np.int32)
        of_all = multihost_utils.process_allgather(mine).reshape(-1, _KEPT)
        common = set.intersection(*(set(row.tolist()) for row in of_all)) - {_NONE}
        return max(common, default=after)

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, float]]:
        """The state of a step that `newest` gave, and what was saved about it.

        Args:
          step: which.
          abstract: as for `newest`.
        """
        contents = self._read(step, abstract)
        assert contents is not None, step
        leaves, tree = jax.tree.flatten(abstract)
        pairs = zip(leaves, contents.leaves, strict=True)
        return jax.tree.unflatten(tree, [_array(*p) for p in pairs]), contents.about

    def drop_after(self, step: int) -> None:
        """Deletes those that a restart at `step` did not take."""
        for other in self._steps():
            if other > step:
                shutil.rmtree(self._folder / str(other), ignore_errors=True)

    def _steps(self) -> list[int]:
        folders = (self._folder.parent, self._folder)
        if not all(_is_own(folder, forbidden=_OTHERS_WRITE) for folder in folders):
            return []
        names = (path.name for path in self._folder.iterdir())
        return sorted(int(name) for name in names if _is_step(name))

    def _write(self, step: int, contents: Contents) -> None:
        part, target = self._folder / f".{step}", self._folder / str(step)
        for folder in (self._folder.parent, self._folder, part):
            _make_private(folder)
        (part / "sha256").write_text(write(part / "shards", contents))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in self._steps()[:-_KEPT]:
            shutil.rmtree(self._folder / str(old), ignore_errors=True)

    def _read(self, step: int, abstract: Any) -> Contents | None:
        """The contents, if they are whole, of the same setting, and fit `abstract`."""
        folder = self._folder / str(step)
        try:
            contents = read(folder / "shards", (folder / "sha256").read_text())
        except (OSError, ValueError, MemoryError):  # missing, altered, another format
            return None
        wanted = jax.tree.leaves(abstract)
        fits = len(contents.leaves) == len(wanted) and all(
            leaf.dtype == x.dtype and leaf.shards.keys() == _local_indices(x)
            for leaf, x in zip(contents.leaves, wanted, strict=True)
        )
        return contents if fits and contents.setting == self._setting else None


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _is_own(folder: pathlib.Path, forbidden: int = 0) -> bool:
    """Returns True for a folder of this user that has none of the `forbidden` modes.

    A link to one is none.
    """
    with contextlib.suppress(OSError):
        status = folder.lstat()
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        return own and not status.st_mode & forbidden
    return False


def _make_private(folder: pathlib.Path) -> None:
    """Makes a folder of mode 0700, and those above it that are not there yet.

    One that is there already gets that mode; those above it keep theirs.

    Raises:
      OSError: it cannot be made, or what is there is not a folder of this user.
    """
    for above in reversed(folder.parents):
        if not above.exists():
            above.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_own(folder):
        raise PermissionError(errno.EPERM, "a folder of another user", str(folder))
    folder.chmod(0o700)


def _local_shards(x: jax.Array) -> Leaf:
    """The shards on this process's devices, each once."""
    shards = {
        _index(shard.index, x.shape): np.asarray(shard.data)
        for shard in x.addressable_shards
    }
    return Leaf(np.dtype(x.dtype), shards)


def _local_indices(x: jax.ShapeDtypeStruct) -> set[Index]:
    """Where the shards of this process's devices lie in the global array."""
    assert x.sharding is not None
    indices = x.sharding.addressable_devices_indices_map(x.shape).values()
    return {_index(index or (), x.shape) for index in indices}


def _array(of: jax.ShapeDtypeStruct, leaf: Leaf) -> jax.Array:
    """A global array from the shards of this process's devices."""

    def local(index: tuple[slice, ...] | None) -> np.ndarray:
        return leaf.shards[_index(index or (), of.shape)]

    assert of.sharding is not None
    return jax.make_array_from_callback(of.shape, of.sharding, local)


def _index(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    """Slices as numbers: start and stop along every axis."""
    ends = (s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    return tuple(ends)
