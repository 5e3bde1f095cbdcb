"""Hosts on one machine: processes of `train`, joined over loopback."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from mtp_jax.distributed.lifetime import PARENT


class HostGroup:
    """The processes of one run; the lines they print are kept, and written to files."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        hosts: int,
        devices: int,
        logs: pathlib.Path,
        missing: Sequence[int] = (),
    ):
        """Starts the processes.

        Args:
          arguments: of the program, `train` first, without those that join the hosts.
          hosts: how many there are.
          devices: CPU devices of each.
          logs: folder of the files `host-0.txt` ...
          missing: hosts that are not started.
        """
        logs.mkdir(parents=True)
        address = f"127.0.0.1:{_free_port()}"
        self.count = hosts
        self.lines: list[list[str]] = [[] for _ in range(hosts)]
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._readers: list[threading.Thread] = []
        for i in range(hosts):
            if i in missing:
                continue
            joining = [
                f"--coordinator={address}",
                f"--num_processes={hosts}",
                f"--process_id={i}",
            ]
            process = subprocess.Popen(
                [sys.executable, "-m", "mtp_jax", *arguments, *joining],
                env=_environment(devices),
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self._processes[i] = process
            reader = threading.Thread(
                target=self._read, args=(i, process, logs / f"host-{i}.txt")
            )
            reader.start()
            self._readers.append(reader)

    def codes(self) -> dict[int, int | None]:
        """The exit code of each host that was started; None: it runs."""
        return {i: process.poll() for i, process in self._processes.items()}

    def running(self) -> bool:
        """True if all of them run."""
        return all(code is None for code in self.codes().values())

    def send(self, number: signal.Signals, *which: int) -> None:
        """Sends a signal to some of them, or to all."""
        for i in which or self._processes:
            # Nothing happens to one that has ended.
            self._processes[i].send_signal(number)

    def pid(self, host: int) -> int:
        """The process id of a host."""
        return self._processes[host].pid

    def wait(self, timeout_s: float) -> tuple[dict[int, int | None], float]:
        """Waits until all have ended; returns their exit codes and the seconds it took.

        Those that have not ended by then are killed; their code is None.
        """
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if all(code is not None for code in self.codes().values()):
                break
            time.sleep(0.02)
        took_s = time.monotonic() - began
        codes = self.codes()
        self.kill()
        return codes, took_s

    def kill(self) -> None:
        """Ends all of them at once, and the reading of what they print."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        for reader in self._readers:
            reader.join()

    def said(self) -> list[str]:
        """Lines that the program printed for people, in the order of hosts."""
        return [line for lines in self.lines for line in lines if _is_ours(line)]

    def _read(self, host: int, process: subprocess.Popen[str], path: pathlib.Path):
        """Keeps the lines of a host, and writes them to its file."""
        assert process.stdout is not None
        with path.open("w", encoding="utf-8") as file, process.stdout:
            for line in process.stdout:
                file.write(line)
                file.flush()
                self.lines[host].append(line.rstrip("\n"))


def _is_ours(line: str) -> bool:
    """True for a line of the program, not of a library's log nor of a traceback."""
    return line.startswith(("mtp-jax:", "told to stop", "done:"))


def _free_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _environment(devices: int) -> dict[str, str]:
    """The environment of a host: CPU devices only, and programs that compile fast."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    path = pathlib.Path(__file__).parent.parent.parent
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        # As in this process, where the package may run from its source tree.
        "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        PARENT: str(os.getpid()),
    }
