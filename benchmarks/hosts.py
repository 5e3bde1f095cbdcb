"""The meeting point of a run with very many hosts: seconds, and CPU of process 0.

Process 0 is a real member with its coordinator, in a process of its own. The others are
simulated by a few processes, each host with a connection of its own over loopback that
speaks the same protocol, so their CPU is on this machine, too.

python -m benchmarks.hosts --hosts=1024
"""

import argparse
import asyncio
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.timing import options, print_environment, print_table, script
from mtp_jax.distributed.cluster import ProcessInfo
from mtp_jax.distributed.coordinator import beat_s, encode, receive
from mtp_jax.distributed.member import Member
from mtp_jax.distributed.secret import Denied, greet
from mtp_jax.errors import RunFailed

_ABOUT = {"mtp_jax": "1", "jax": "1", "config": "0" * 12}
_JOIN_S = 300  # config.train.join_timeout_s
_TICKS = os.sysconf("SC_CLK_TCK")
_SPAWN = multiprocessing.get_context("spawn")


@script
def main(argv: list[str]) -> int:
    """Prints a row for each event: seconds until all know, and CPU of process 0."""
    args = options(
        argv,
        "Joining, signs of life, SIGTERM, loss and refusal, by number of hosts.",
        hosts=1024,
        processes=4,  # that simulate them
        slow=8,  # hosts that read nothing, where there are any
        strangers=2000,  # that come at once, with another secret
        beats=4,  # signs of life of each host while CPU is counted
        host_timeout_s=60,  # config.train.host_timeout_s
    )
    print_environment(1)
    rows = [*_ordinary(args), *_with_slow_readers(args), *_with_a_misfit(args)]
    print_table(("event", "s", "CPU of process 0, s"), *rows)
    return 0


def _ordinary(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Rows of a run that is told to stop, and then fails."""
    with _Run(args) as run:
        others = args.hosts - 1
        rows = [run.timed("all have joined", others, "names", run.join)]
        run.command({"barrier": "first"})
        rows.append(
            run.timed("a barrier of all", others, "pass", lambda: run.tell(at="first"))
        )
        seconds = args.beats * beat_s(args.host_timeout_s)
        before = run.cpu_s()
        time.sleep(seconds)
        rows.append((f"signs of life, {args.beats} of each host", f"{seconds:.0f}",
                     f"{run.cpu_s() - before:.2f}"))  # fmt: skip
        rows.append(run.timed("a stranger is turned away", 1, "denied",
                              lambda: run.strangers(1)))  # fmt: skip
        n = args.strangers
        rows.append(run.timed(f"{n} strangers at once are", n, "denied",
                              lambda: run.strangers(n)))  # fmt: skip
        rows.append(run.timed("SIGTERM of one: all know the last step", others, "last",
                              lambda: run.tell(only=1, stop=True)))  # fmt: skip
        rows.append(run.timed("process 0 fails: all have ended", others, "end",
                              lambda: run.command({"fail": True})))  # fmt: skip
        rows.append(("memory of process 0, MB", f"{run.memory_mb:.0f}", ""))
    return rows


def _with_slow_readers(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Rows of a run in which some read nothing, and one is lost."""
    with _Run(args, slow=args.slow) as run:
        others = args.hosts - 1 - args.slow
        name = f"with {args.slow} that read nothing: "
        rows = [run.timed(f"{name}all others have joined", others, "names", run.join)]
        time.sleep(2 * beat_s(args.host_timeout_s))
        lost = args.hosts - 1
        rows.append(run.timed(f"{name}one is lost, all others have ended", others - 1,
                              "end", lambda: run.close_host(lost)))  # fmt: skip
        began = time.monotonic()
        run.zero.join(60)
        rows.append((f"{name}process 0 has ended after them",
                     f"{time.monotonic() - began:.2f}", ""))  # fmt: skip
    return rows


def _with_a_misfit(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """A row of a meeting with a host that has another config than the others."""
    with _Run(args, misfit=args.hosts // 2) as run:
        return [run.timed("a host with another config: all are refused",
                          args.hosts - 1, "end", run.join)]  # fmt: skip


class _Run:
    """Process 0 and the processes that simulate the others; a context."""

    def __init__(self, args: argparse.Namespace, slow: int = 0, misfit: int = 0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        secret = secrets.token_hex(16).encode()
        self._zero_end, end = _SPAWN.Pipe()
        self._started: list[BaseProcess] = []
        self.memory_mb = 0.0
        timeout_s = args.host_timeout_s
        self.zero = self._start(_process_0, end, args.hosts, port, secret, timeout_s)
        self._ends = []
        for number in range(args.processes):
            numbers = range(1 + number, args.hosts, args.processes)
            hosts = [_Host(i, i <= slow, i == misfit) for i in numbers]
            mine, end = _SPAWN.Pipe()
            self._start(_simulate, end, hosts, args.hosts, port, secret, timeout_s)
            self._ends.append(mine)
        for mine in [self._zero_end, *self._ends]:
            assert mine.recv() == "ready"

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
            process.join()

    def _start(self, target: Callable[..., None], *args: Any) -> BaseProcess:
        process = _SPAWN.Process(target=target, args=args, daemon=True)
        process.start()
        self._started.append(process)
        return process

    def timed(
        self, name: str, count: int, kind: str, begin: Callable[[], None]
    ) -> tuple[str, str, str]:
        """A row: the seconds from `begin` to the `count`-th event of a kind.

        Raises:
          RuntimeError: they do not come.
        """
        cpu_s, began, last, come = self.cpu_s(), time.monotonic(), 0.0, 0
        begin()
        while come < count:
            ready = multiprocessing.connection.wait(self._ends, 120)
            if not ready:
                raise RuntimeError(f"{name}: {come} of {count} events {kind!r}")
            for mine in ready:
                assert isinstance(mine, multiprocessing.connection.Connection)
                for event, at in mine.recv():
                    if event == kind:
                        come, last = come + 1, max(last, at)
        return name, f"{last - began:.3f}", f"{self.cpu_s() - cpu_s:.2f}"

    def cpu_s(self) -> float:
        """CPU time of process 0 until now; that of the last call once it has ended."""
        folder = pathlib.Path(f"/proc/{self.zero.pid}")
        with contextlib.suppress(OSError, LookupError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            self._cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS
            for line in (folder / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.memory_mb = int(line.split()[1]) / 1024
        return self._cpu_s

    def command(self, command: dict[str, Any]) -> None:
        """Has process 0 do something."""
        self._zero_end.send(command)

    def join(self) -> None:
        """Has all hosts come at once."""
        self.command({"meet": True})
        self._tell_all({"join": True})

    def tell(self, only: int | None = None, **message: Any) -> None:
        """Has all hosts, or one, send a message to process 0."""
        self._tell_all({"only": only, "send": message})

    def strangers(self, count: int) -> None:
        """Has strangers come."""
        for mine, n in zip(self._ends, _shares(count, len(self._ends)), strict=True):
            mine.send({"strangers": n})

    def close_host(self, index: int) -> None:
        """Has a host lose its connection."""
        self._tell_all({"close": index})

    def _tell_all(self, command: dict[str, Any]) -> None:
        for mine in self._ends:
            mine.send(command)


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _process_0(end: Any, count: int, port: int, secret: bytes, timeout_s: int) -> None:
    """Process 0 of the run, as `hosts.join` makes it, without jax.distributed."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (what ends it, it says there)
    process = ProcessInfo(f"127.0.0.1:{port}", count, 0)
    member = Member(process, _JOIN_S, timeout_s, _ABOUT, lambda: secret)
    end.send("ready")
    while True:
        command = end.recv()
        if "meet" in command:
            member.meet()
        elif "barrier" in command:
            member.wait_for_all(command["barrier"])
        else:
            member.fail(RunFailed("the end of the benchmark"))


@dataclasses.dataclass
class _Host:
    """A simulated host."""

    index: int
    slow: bool  # reads nothing
    misfit: bool  # has another config
    writer: asyncio.StreamWriter | None = None


def _simulate(end: Any, *args: Any) -> None:
    """A process that simulates hosts, and tells when which message came."""
    asyncio.run(_Swarm(end, *args).run())


class _Swarm:
    """Hosts of one process."""

    def __init__(
        self,
        end: Any,
        hosts: list[_Host],
        count: int,
        port: int,
        secret: bytes,
        host_timeout_s: int,
    ):
        self._end = end
        self._hosts = hosts
        self._count = count
        self._port = port
        self._secret = secret
        self._beat_s = beat_s(host_timeout_s)
        self._events: list[tuple[str, float]] = []
        self._tasks: set[asyncio.Task] = set()

    async def run(self) -> None:
        """Does what it is told, until it is killed."""
        self._spawn(self._report())
        self._end.send("ready")
        while True:
            command = await asyncio.to_thread(self._end.recv)
            if "join" in command:
                for host in self._hosts:
                    self._spawn(self._be(host))
            for _ in range(command.get("strangers", 0)):
                self._spawn(self._be_stranger())
            for host in self._hosts:
                if host.writer is None:
                    continue
                if "send" in command and command["only"] in (None, host.index):
                    host.writer.write(encode(command["send"]))
                if command.get("close") == host.index:
                    host.writer.close()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            if self._events:
                self._end.send(self._events)
                self._events = []

    def _note(self, event: str) -> None:
        self._events.append((event, time.monotonic()))

    async def _open(
        self, slow: bool = False
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            here = socket.socket()
            if slow:  # else the kernel takes all that it is told for it
                here.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            here.setblocking(False)
            try:
                loop = asyncio.get_running_loop()
                await loop.sock_connect(here, ("127.0.0.1", self._port))
                return await asyncio.open_connection(sock=here, limit=1 << 20)
            except OSError:  # it does not listen yet
                here.close()
                await asyncio.sleep(0.2)

    async def _be(self, host: _Host) -> None:
        """A host, as `member` is one; it takes five steps before it is asked."""
        reader, writer = await self._open(host.slow)
        hello = {
            "kind": "host",
            "host": host.index,
            "of": self._count,
            "name": f"host-{host.index:05d}.pod.example",
            "about": _ABOUT | ({"config": "another"} if host.misfit else {}),
            "status": {},
        }
        await greet(reader, writer, lambda: self._secret, hello)
        host.writer = writer
        if host.slow:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        else:
            self._spawn(self._hear(reader, writer))
        while not writer.is_closing():
            writer.write(encode({"status": {"step": 5}}))
            await asyncio.sleep(self._beat_s)

    async def _hear(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError, ValueError):
            while message := await receive(reader):
                for kind in message:
                    self._note(kind)
                if "how far" in message:
                    writer.write(encode({"begun": 5}))
                if "end" in message:
                    break
        writer.close()

    async def _be_stranger(self) -> None:
        reader, writer = await self._open()
        with contextlib.suppress(OSError, ValueError, Denied):
            await greet(reader, writer, lambda: b"x" * 32, {"kind": "host"})
        self._note("denied")
        writer.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
