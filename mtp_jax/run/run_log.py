"""What a run writes about itself: files for tools, a line for people.

`metrics.jsonl` has one object a logged step, `heldout.jsonl` one an evaluation,
`run.json` says what ran on what; TensorBoard gets the same scalars.
"""

import dataclasses
import json
import math
import platform
import sys
import time
from importlib import metadata
from typing import Any

import jax
from etils import epath

from mtp_jax.storage import is_remote, write_atomically

_REMOTE_EVERY_S = 30.0
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunLog:
    """The files of a workdir; only process 0 writes."""

    def __init__(self, workdir: epath.Path, start_step: int, tensorboard: bool):
        """Opens them, dropping what was logged after start_step: it will come again."""
        self._active = jax.process_index() == 0
        self._files: dict[str, Any] = {}
        self._tensorboard = None
        if not self._active:
            return
        for name in ("metrics.jsonl", "heldout.jsonl"):
            keep_until(workdir / name, start_step)
            self._files[name] = _Lines(workdir / name)
        if tensorboard:
            from tensorboardX import SummaryWriter  # over a second to import

            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"), purge_step=start_step + 1
            )

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Appends a record to a file, and its numbers to TensorBoard."""
        if not self._active:
            return
        # JSON has no NaN: a number that is not finite is null there.
        plain = {k: None if _not_finite(v) else v for k, v in record.items()}
        self._files[name].add(json.dumps(plain, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            group = name.removesuffix(".jsonl")
            for key, value in record.items():
                if key != "step" and isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(
                        f"{group}/{key}", value, record["step"]
                    )
            self._tensorboard.flush()

    def sync(self) -> None:
        """All that was written is in the files from here on, wherever they are."""
        for lines in self._files.values():
            lines.sync()

    def say(self, line: str) -> None:
        """A line for people, on stdout."""
        if self._active:
            print(line, flush=True)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


@dataclasses.dataclass(frozen=True)
class Window:
    """Means over the steps between two lines of the log, in seconds a step."""

    step_s: float
    data_s: float  # of it, waiting for data
    own_s: float  # of it, not waiting for devices: the work of this host


class Stopwatch:
    """Wall time of the steps since the last reading, and what was waited for."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forgets what passed, such as an evaluation between two steps."""
        self._begin, self._steps = time.perf_counter(), 0
        self._data_s = self._devices_s = 0.0

    def waited(self, seconds: float) -> None:
        self._data_s += seconds

    def stepped(self, waited_s: float) -> None:
        """Counts a step, for whose end the devices let the host wait so long."""
        self._steps += 1
        self._devices_s += waited_s

    def read(self) -> Window:
        """The window up to now; begins anew."""
        passed, steps = time.perf_counter() - self._begin, max(self._steps, 1)
        own_s = (passed - self._devices_s) / steps
        result = Window(passed / steps, self._data_s / steps, own_s)
        self.restart()
        return result


class _Lines:
    """A file that grows by lines.

    Nothing can be appended to an object of a store, and opening one for it would
    silently begin it anew: there, the file is written as a whole, now and then.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._written = time.monotonic()
        if is_remote(path):
            self._file = None
            self._text = [path.read_text()] if path.exists() else []
        else:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._text.append(line)
        if time.monotonic() - self._written > _REMOTE_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Writes what has come since the last time; a local file has it already."""
        if self._file is None:
            self._path.write_text("".join(self._text))
            self._written = time.monotonic()

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def keep_until(path: epath.Path, step: int) -> None:
    """Drops the records after `step`, and a last line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if line and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_atomically(path, "".join(kept))


def environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Versions, devices and mesh, for run.json."""
    device = jax.devices()[0]
    return {
        "versions": {
            "mtp_jax": metadata_version("mtp-jax"),
            "python": platform.python_version(),
            **{name: metadata_version(name) for name in _PACKAGES},
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "mesh": dict(mesh.shape),
        "command": sys.argv,
    }


def metadata_version(package: str) -> str | None:
    """Version of an installed package, None if it runs from a source tree."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
