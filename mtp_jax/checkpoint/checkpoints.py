"""Saving and restoring a run with Orbax: asynchronous, sharded, on any mesh.

A checkpoint holds `params` and `training` (optimizer state, step, random key) as
separate items, so that evaluation reads parameters only, and as metadata the frozen
config, the data position, the tokenizer's identity and a checksum of every array.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from mtp_jax.checkpoint.library_log import show_warnings_only
from mtp_jax.checkpoint.older_states import as_saved, as_wanted
from mtp_jax.checkpoint.retention import HELDOUT_LOSS, retention
from mtp_jax.config import CheckpointConfig
from mtp_jax.distributed import hosts
from mtp_jax.errors import NO_ROOM, RunFailed, UserError, warn
from mtp_jax.parallel.sharding import abstract_tree
from mtp_jax.storage import absolute, is_remote
from mtp_jax.training.train_step import TrainState


class Checkpoints:
    """The checkpoints of a workdir, in its folder `checkpoints`."""

    def __init__(self, workdir: epath.PathLike, cfg: CheckpointConfig | None = None):
        """Opens them; without cfg nothing is ever deleted (reading)."""
        show_warnings_only()
        self.folder = epath.Path(workdir) / "checkpoints"
        if cfg is not None and jax.process_index() == 0:
            for part in self.folder.glob("*.orbax-checkpoint-tmp"):
                part.rmtree()  # a save that a crash cut short
        hosts.wait_for_all("the checkpoints are tidy")
        self._measured: dict[int, float] = {}
        try:
            self._orbax = ocp.training.Checkpointer(
                absolute(self.folder),
                preservation_policy=cfg and retention(cfg, self._measured),
            )
        except (OSError, ValueError) as error:  # a file of it is not what it must be
            raise UserError(f"{self.folder} cannot be read: {error}") from error
        self._pending: Any = None
        self._saving = 0  # the step
        self._proved = False  # that what is saved here can be read
        self._timeout_s = (cfg or CheckpointConfig()).timeout_s

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return [c.step for c in self._orbax.checkpoints]

    def save(
        self,
        step: int,
        state: TrainState,
        metadata: dict[str, Any],
        heldout_loss: float | None = None,
    ) -> None:
        """Begins to save; returns once the arrays are copied off the devices.

        The first time it returns once the checkpoint is on disk and can be read. A
        `heldout_loss` that is not finite counts as none.

        Raises:
          UserError: this save or the one before it found no room on the disk.
          RunFailed: the first checkpoint cannot be read.
        """
        self.wait()
        items = _items(state)
        sums = {name: _plain(jax.device_get(_sums(items[name]))) for name in items}
        self._saving = step
        measured = heldout_loss is not None and math.isfinite(heldout_loss)
        with self._in_time(), _disk_full_is_said(self.folder, self.steps()):
            self._pending = self._orbax.save_checkpointables_async(
                step,
                items,
                force=True,
                overwrite=True,
                metrics={HELDOUT_LOSS: heldout_loss} if measured else None,
                custom_metadata={**metadata, "checksums": sums},
            )
        if not self._proved:
            self.wait()
            self._prove(list(sums))

    def measured(self, heldout_losses: dict[int, float]) -> None:
        """Takes, by step, held-out losses that the checkpoints do not hold.

        All processes must give the same ones.
        """
        self._measured |= heldout_losses

    def wait(self) -> None:
        """Waits until the last save is on disk; its failure is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._in_time(), _disk_full_is_said(self.folder, self.steps()):
                pending.result()

    def _prove(self, names: list[str]) -> None:
        """Reads the description of the newest checkpoint, which Orbax may not find."""
        folder = self.folder / str(self._saving)
        try:
            saved = self._orbax.checkpointables_metadata(self._saving)
            if any(saved.metadata[name] is None for name in names):
                raise ValueError("its arrays are not found")
        except Exception as error:
            raise RunFailed(
                f"{folder} was saved, but cannot be read: {error}"
            ) from error
        self._proved = True

    def _in_time(self) -> contextlib.AbstractContextManager[None]:
        """A limit for what is inside: Orbax waits for a failed process for ever."""
        late = RunFailed(
            f"the checkpoint of step {self._saving} in {self.folder} was not finished "
            f"within config.checkpoint.timeout_s ({self._timeout_s}); what is the disk "
            "of each host like? Run the same command again"
        )
        return hosts.within(self._timeout_s, late)

    def close(self) -> None:
        """Waits for what is not finished, and lets go of the folder."""
        self.wait()
        self._orbax.close()

    def saved_metadata(self, step: int | None = None) -> dict[str, Any]:
        """The metadata saved with a checkpoint, as JSON values.

        Args:
          step: which checkpoint; None for the newest whose metadata can be read.

        Raises:
          UserError: there is none.
        """
        for candidate in reversed(self.steps()) if step is None else [step]:
            try:
                found = self._orbax.checkpointables_metadata(candidate).custom_metadata
            except Exception:  # damaged; `restore_newest` reports it
                continue
            if found:
                return found
        raise UserError(f"{self.folder} holds no checkpoint that can be read.")

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The items of a checkpoint, with the shapes and shardings of `abstract`.

        Args:
          step: which checkpoint.
          abstract: item name to a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          UserError: the saved arrays have other names, shapes or dtypes.
          DamagedCheckpoint: the files cannot be read, or hold other values than were
            saved.
        """
        try:
            saved = self._orbax.checkpointables_metadata(step)
            trees = {name: saved.metadata[name] for name in abstract}
            sums = saved.custom_metadata["checksums"]
        except Exception as error:
            raise DamagedCheckpoint(self.folder / str(step), error) from error
        if lost := [name for name, tree in trees.items() if tree is None]:
            cause = ValueError(f"nothing of {' and '.join(lost)} can be read")
            raise DamagedCheckpoint(self.folder / str(step), cause)
        saved_form = as_saved(abstract, trees)
        _refuse_mismatch(self.folder / str(step), trees, saved_form)
        try:
            items = self._orbax.load_checkpointables(step, saved_form)
        except (PermissionError, MemoryError):
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            damage = DamagedCheckpoint(self.folder / str(step), error)
            damage.seen_by_all = jax.process_count() == 1
            raise damage from error
        found = {name: _plain(jax.device_get(_sums(items[name]))) for name in items}
        wrong = [name for name in found if found[name] != sums[name]]
        if wrong:
            cause = ValueError(f"the checksums of {' and '.join(wrong)} do not match")
            raise DamagedCheckpoint(self.folder / str(step), cause)
        return as_wanted(items, abstract)

    def set_aside(self, step: int) -> epath.Path:
        """Moves a damaged checkpoint out of the way; all processes must call it."""
        target = self.folder.parent / "damaged" / str(step)
        if jax.process_index() == 0:
            target = self.move_aside(step)
        hosts.wait_for_all(f"checkpoint {step} is set aside")
        self._orbax.reload()
        return target

    def move_aside(self, step: int) -> epath.Path:
        """Moves it away where this process alone, of several, knows of the damage."""
        target = self.folder.parent / "damaged" / str(step)
        target.parent.mkdir(exist_ok=True)
        if is_remote(target):  # where a folder is there once something is in it
            (target.parent / "README").write_text("Checkpoints that were damaged.\n")
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{step}.{number}")
        (self.folder / str(step)).rename(target)
        return target


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are missing, unreadable or altered."""

    seen_by_all = True  # False: the other processes may wait for this one in Orbax

    def __init__(self, folder: epath.Path, cause: Exception):
        self.step = int(folder.name)
        while cause.__cause__ is not None:  # what Orbax makes of it says less
            cause = cause.__cause__  # type: ignore[assignment]
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        super().__init__(f"checkpoint {folder} is damaged: {first_line[:160]}")


def restore_newest(
    checkpoints: Checkpoints, abstract: dict[str, Any], step: int | None = None
) -> tuple[int, dict[str, Any], list[int]]:
    """The newest intact checkpoint, or the one of `step`.

    Returns:
      Its step, its items, and the steps of damaged ones that were passed over, each
      reported on stderr.

    Raises:
      UserError: there is no such checkpoint, or none that can be read.
      DamagedCheckpoint: this process alone, of several, could not read its part.
    """
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise UserError(
            f"{checkpoints.folder} has no checkpoint of step {step}; there are {steps}."
        )
    damaged: list[int] = []
    for candidate in [step] if step is not None else reversed(steps):
        try:
            return candidate, checkpoints.restore(candidate, abstract), damaged
        except DamagedCheckpoint as error:
            if not error.seen_by_all:
                raise
            warn(f"mtp-jax: {error}")
            damaged.append(candidate)
    raise UserError(f"{checkpoints.folder} holds no checkpoint that can be read.")


def abstract_items(state: TrainState) -> dict[str, Any]:
    """The items to restore on the mesh that is set, from `eval_shape` of a state."""
    return abstract_tree(_items(state), jax.sharding.get_mesh())


def state_from_items(items: dict[str, Any]) -> TrainState:
    """The training state that restored items make up."""
    return TrainState(params=items["params"], **items["training"])


def _items(state: TrainState) -> dict[str, Any]:
    """A state as the items of a checkpoint, which are saved apart."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    fields = {name: x for name, x in fields.items() if x is not None}
    return {"params": fields.pop("params"), "training": fields}


@jax.jit
def _sums(tree: Any) -> Any:
    """Wrap-around sums of the bit patterns of every array, uint32 scalars.

    They are the same on any mesh, and any flipped bit changes them. Orbax itself
    notices missing bytes, not altered ones.
    """

    def bits(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)

    return jax.tree.map(bits, tree)


def _plain(tree: Any) -> dict[str, int]:
    """A tree of scalars as JSON: path to integer."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {_name(path): int(x) for path, x in leaves}


def _name(path: tuple[Any, ...]) -> str:
    """A path as `params/trunk/w_q`, alike for a named tuple and Orbax's dict of it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _refuse_mismatch(
    folder: epath.Path, saved: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Raises UserError with the difference of two trees of arrays, if there is one."""

    def shown(x: Any) -> str:
        return f"{x.dtype}{list(x.shape)}"

    def shapes(tree: Any) -> dict[str, str]:
        leaves, _ = jax.tree.flatten_with_path(
            tree, is_leaf=lambda x: hasattr(x, "shape")
        )
        return {_name(path): shown(x) for path, x in leaves}

    there, here = shapes(saved), shapes(wanted)
    rows = [
        f"{name} is {there.get(name, 'not')} there, {here.get(name, 'not')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if rows:
        more = f"; and {len(rows) - 8} more" if len(rows) > 8 else ""
        raise UserError(
            f"checkpoint {folder} does not fit this model: {'; '.join(rows[:8])}{more}."
        )


@contextlib.contextmanager
def _disk_full_is_said(folder: epath.Path, intact: list[int]) -> Iterator[None]:
    """Turns errors that say "no space" in any way into one line; others pass."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__} {error} {error.__cause__}"
        full = isinstance(error, OSError) and error.errno in NO_ROOM
        if not full and not any(sign in text for sign in _NO_ROOM_SIGNS):
            raise
        kept = f"; the checkpoint of step {intact[-1]} is intact" if intact else ""
        raise UserError(
            f"no room on the disk for a checkpoint in {folder}{kept}; free space and "
            "run the same command again."
        ) from error


_NO_ROOM_SIGNS = ("No space left on device", "Disk quota exceeded", "File too large")
