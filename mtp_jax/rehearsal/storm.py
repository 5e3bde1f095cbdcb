"""A run whose hosts are started, ended and started again, and what it has on disk."""

import json
import pathlib
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from mtp_jax.config import Config
from mtp_jax.rehearsal.processes import Hosts
from mtp_jax.rehearsal.scale import scaled_mesh

_FIRST_START_S = 900  # compiles; seconds, or minutes on a loaded machine
_START_S = 120  # of a later one, at least; else so many times the slowest before
_SLOWER = 4
_STEPS_AFTER_START = 2


class Broken(Exception):
    """Raised where something that should hold does not; the text says what."""


class Storm:
    """One workdir and the processes that train in it, one group after another."""

    def __init__(
        self,
        cfg: Config,
        config_file: pathlib.Path,
        folder: pathlib.Path,
        hosts: int,
        devices: int,
        seed: int,
    ):
        """Starts nothing.

        Args:
          cfg: what `config_file` says.
          config_file: the config of the hosts.
          folder: gets the workdir and the logs.
          hosts: on how many the run normally is.
          devices: of each host.
          seed: of everything that is left to chance.
        """
        self.cfg = cfg
        self.hosts = hosts
        self.devices = devices
        self.rng = random.Random(seed)
        self.workdir = folder / "run"
        self.checkpoints = self.workdir / "checkpoints"
        self._config_file = config_file
        self._logs = folder / "logs"
        self._starts = 0
        self.patience_s: float = _FIRST_START_S  # for a start
        self._slowest_s = 0.0
        self.group: Hosts | None = None
        self.resume_at = 0  # step of the checkpoint that the next start must continue

    def arguments(self, hosts: int, overrides: Sequence[str] = ()) -> list[str]:
        """Arguments of the command `train`, for so many hosts."""
        mesh = vars(scaled_mesh(self.cfg.mesh, hosts * self.devices))
        return [
            "train",
            f"--config={self._config_file}",
            f"--workdir={self.workdir}",
            *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
            *overrides,
        ]

    def start(
        self,
        hosts: int | None = None,
        overrides: Sequence[str] = (),
        missing: Sequence[int] = (),
    ) -> Hosts:
        """Starts processes that train in the workdir; they are not `group`."""
        count = hosts or self.hosts
        self._starts += 1
        return Hosts(
            self.arguments(count, overrides),
            hosts=count,
            devices=self.devices,
            logs=self._logs / f"{self._starts:03d}",
            missing=missing,
        )

    def up(self, hosts: int | None = None, overrides: Sequence[str] = ()) -> Hosts:
        """Starts a group if there is none, and waits until it trains.

        Raises:
          Broken: it ends, takes too long, or begins at another step than it should.
        """
        began_s = time.monotonic()
        if self.group is None:
            self.group = self.start(hosts, overrides)
            self._wait_for(lambda: self._beginning() is not None, "nothing began")
            began = self._beginning()
            if began != self.resume_at:
                raise Broken(f"began after step {began}, not {self.resume_at}")
        reached = self.step()
        self._wait_for(
            lambda: self.step() >= max(reached, self.resume_at) + _STEPS_AFTER_START,
            "no new steps",
        )
        self._slowest_s = max(self._slowest_s, time.monotonic() - began_s)
        self.patience_s = max(_START_S, _SLOWER * self._slowest_s)
        return self.group

    def down(self, timeout_s: float) -> tuple[dict[int, int | None], float, list[str]]:
        """Waits for the group to end: exit codes by host, seconds, printed lines."""
        assert self.group is not None
        group, self.group = self.group, None
        codes, took_s = group.wait(timeout_s)
        self.resume_at = max(self.steps_saved(), default=0)
        return codes, took_s, group.said()

    def close(self) -> None:
        """Ends whatever runs."""
        if self.group is not None:
            self.group.kill()
            self.group = None

    def steps_saved(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        names = [path.name for path in self.checkpoints.iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def step(self) -> int:
        """The newest step of metrics.jsonl; 0 if there is none."""
        rows = self.records()
        return rows[-1]["step"] if rows else 0

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def wait_for_save(self) -> None:
        """Waits for a checkpoint newer than the one the group began with.

        Raises:
          Broken: none comes.
        """
        begun = self.resume_at
        self._wait_for(
            lambda: max(self.steps_saved(), default=0) > begun, "no checkpoint"
        )

    def pause(self, longest_s: float = 1.5) -> None:
        """Sleeps for a random time."""
        time.sleep(self.rng.uniform(0, longest_s))

    def copy_of(self, path: pathlib.Path) -> pathlib.Path:
        """A copy beside the run, to be put back."""
        kept = self._logs.parent / "kept" / path.name
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(path, kept)
        return kept

    def _beginning(self) -> int | None:
        """The step after which the group says that it begins; None: not yet."""
        assert self.group is not None
        for line in self.group.lines[0]:
            if f"{self.workdir} begins" in line:
                return 0
            if found := re.search(r"continues after step (\d+)", line):
                return int(found[1])
        return None

    def _wait_for(self, ready: Callable[[], bool], otherwise: str) -> None:
        assert self.group is not None
        end = time.monotonic() + self.patience_s
        while not ready():
            if not self.group.running():
                codes = self.group.wait(60)[0]
                said = self.group.said() or ["nothing was said"]
                self.close()
                raise Broken(f"{otherwise}: ended with {codes}: {said[-1]}")
            if time.monotonic() > end:
                self.close()
                raise Broken(f"{otherwise} within {self.patience_s:.0f} s")
            time.sleep(0.02)
