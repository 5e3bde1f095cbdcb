"""The coordinator of a run: a server in process 0 through which processes meet.

Each process (`member`) keeps one connection to it, on which both sides send a JSON
object a line. A process that is killed closes its connection, one that freezes falls
silent, one that fails says so; whatever comes first ends all the others, with the same
line. The same port passes on what jax.distributed sends to its own service (`hosts`).
Whoever does not know the run's secret is turned away (`gate`).
"""

import asyncio
import dataclasses
import json
import time
from typing import Any

from mtp_jax.distributed.gate import Gate
from mtp_jax.distributed.stop import NOTHING_BEGUN
from mtp_jax.errors import warn

_LATE_S = 10.0  # for processes that still start to hear that they need not
_REFUSAL_S = 30.0  # for all processes to hear that they do not fit together
_FAREWELL_S = 5.0  # for the others to hear the end before process 0 ends


@dataclasses.dataclass
class _Peer:
    """A process as the coordinator knows it."""

    name: str
    about: dict[str, str]
    writer: asyncio.StreamWriter
    heard: float
    status: dict[str, Any] = dataclasses.field(default_factory=dict)
    gone: bool = False  # it has said goodbye


class Coordinator:
    """The server in process 0; all of it runs in one event loop."""

    def __init__(
        self, count: int, join_timeout_s: float, host_timeout_s: float, secret: bytes
    ):
        """Waits for `count` processes; times are those of `config.train`, in s."""
        self._count = count
        self._join_timeout_s = join_timeout_s
        self._host_timeout_s = host_timeout_s
        self._peers: dict[int, _Peer] = {}
        self._met = False
        self._waiting: dict[str, set[int]] = {}  # who has come to which barrier
        self._begun: dict[int, int] = {}  # how far each has come, at a SIGTERM
        self._stopping = False
        self._arrived = 0
        self._refusal = ""  # why these processes cannot be a group, or are not to be
        self._refusal_code = 2
        self._ended = False
        self._service: int | None = None  # port of jax.distributed, on this machine
        self._tasks: set[asyncio.Task] = set()  # the event loop itself does not
        self._gate = Gate(secret, count, self._serve)

    async def listen(self, host: str, port: int) -> None:
        """Begins to serve.

        Raises:
          OSError: the port is taken.
        """
        await self._gate.listen(host, port)
        self._spawn(self._watch_peers())

    def open_service(self, port: int) -> None:
        """Says where the service of jax.distributed listens."""
        self._service = port

    def statuses(self) -> dict[int, dict[str, Any]]:
        """The last status of each process, by its number."""
        return {i: peer.status for i, peer in self._peers.items()}

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(
        self,
        hello: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if hello["kind"] == "service":
            await self._pass_on(reader, writer)
        elif hello["kind"] == "host":
            await self._hear(hello, reader, writer)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Connects a process with the service of jax.distributed."""
        for _ in range(600):
            if self._service is not None:
                try:
                    there = await asyncio.open_connection("127.0.0.1", self._service)
                    break
                except OSError:
                    pass
            await asyncio.sleep(0.1)
        else:
            return
        await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    async def _hear(
        self,
        hello: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if self._met:  # to come again when this run is over, and another one begins
            writer.write(encode({"busy": "a run of other processes is in progress"}))
            return
        index = int(hello["host"])
        peer = _Peer(
            hello["name"], hello["about"], writer, time.monotonic(), hello["status"]
        )
        self._arrived += 1
        wrong = self._refusal or self._wrong(index, int(hello["of"]), peer)
        if wrong:
            writer.write(encode({"end": wrong, "code": self._refusal_code}))
            if not self._refusal:
                self._refusal = wrong
                self._spawn(self._refuse(_REFUSAL_S))
            return
        self._peers[index] = peer
        if len(self._peers) == self._count:
            self._met = True
            names = [self._peers[i].name for i in range(self._count)]
            self._tell({"names": names})
        try:
            while message := await receive(reader):
                peer.heard = time.monotonic()
                await self._take(index, peer, message)
        except (OSError, ValueError):
            pass
        if not self._met:
            self._wait_again(index)
        elif not peer.gone:
            await self._lose(index, "its process ended")

    def _wait_again(self, index: int) -> None:
        """Forgets a process that went while others gather: it may yet come again."""
        if not (self._refusal or self._ended):
            warn(
                f"mtp-jax: {self._called(index)} came and went; waiting for it to come "
                "again (config.train.join_timeout_s)"
            )
        self._peers.pop(index, None)

    async def _refuse(self, wait_s: float) -> None:
        """Ends a meeting that came to nothing, but waits a while for all to hear it."""
        end = time.monotonic() + wait_s
        while self._arrived < self._count and time.monotonic() < end:
            await asyncio.sleep(0.1)
        await self._end(self._refusal, self._refusal_code)

    def _stop_meeting(self) -> None:
        """Ends a meeting in which a process was told to stop; process 0 ends last."""
        self._refusal, self._refusal_code = NOTHING_BEGUN, 0
        self._tell({"end": NOTHING_BEGUN, "code": 0}, but=(0,))
        self._spawn(self._refuse(_LATE_S))

    def _wrong(self, index: int, count: int, peer: _Peer) -> str:
        """Returns why a process must not join; empty if it may."""
        if count != self._count or not 0 <= index < count:
            return (
                f"{peer.name} came as process {index} of {count}, but process 0 "
                f"was told --num_processes={self._count}"
            )
        if other := self._peers.get(index):
            return (
                f"two processes came as --process_id={index}, on {other.name} and on "
                f"{peer.name}"
            )
        there = next(iter(self._peers.values()), peer)  # the others are like it
        for key in sorted(there.about.keys() | peer.about.keys()):
            here, other_value = peer.about.get(key), there.about.get(key)
            if here != other_value:
                return (
                    f"the hosts differ in {key}: {peer.name} has {here}, "
                    f"{there.name} {other_value}"
                )
        return ""

    async def _take(self, index: int, peer: _Peer, message: dict[str, Any]) -> None:
        if "status" in message:
            peer.status = message["status"]
        if "failed" in message:
            peer.gone = True
            line = f"{self._called(index)}: {message['failed']}"
            await self._end(line, message["code"], teller=index)
            peer.writer.write(encode({"told": True}))
        if "at" in message:
            there = self._waiting.setdefault(message["at"], set())
            there.add(index)
            if len(there) == self._count:
                del self._waiting[message["at"]]
                self._tell({"pass": message["at"]})
        if "stop" in message and not (self._stopping or self._refusal):
            self._stopping = True
            if self._met:
                self._tell({"how far": True})
            else:
                self._stop_meeting()
        if "begun" in message:
            self._begun[index] = message["begun"]
            if len(self._begun) == self._count:
                await self._stop_after(max(self._begun.values()) + 1)
        if "bye" in message:
            peer.gone = True
            if all(p.gone for p in self._peers.values()):
                self._tell({"bye": True})

    async def _stop_after(self, step: int) -> None:
        """Tells all to stop after a step; at once where none has begun (step 0)."""
        if step == 0:
            await self._end(NOTHING_BEGUN, 0)
        else:
            self._tell({"last": step})

    async def _watch_peers(self) -> None:
        """Ends the run where a process does not come, or falls silent."""
        begun = before = time.monotonic()
        pause = beat_s(self._host_timeout_s)
        limit = silence_s(self._host_timeout_s)
        while not self._ended:
            rest = pause if self._met else min(pause, 0.5)
            await asyncio.sleep(rest)
            now = time.monotonic()
            # While this process itself did not run it could hear nothing.
            asleep, before = now - before - rest, now
            if not self._met:
                if now - begun > self._join_timeout_s and not self._refusal:
                    await self._end(self._missing(), 1)
                continue
            self._tell({"beat": True})
            for i, peer in list(self._peers.items()):
                peer.heard += asleep
                if not peer.gone and now - peer.heard > limit:
                    await self._lose(i, silence(self._host_timeout_s))

    async def _lose(self, index: int, how: str) -> None:
        self._peers[index].gone = True  # nobody waits for it
        await self._end(f"{self._called(index)} is lost: {how}", 1)

    def _missing(self) -> str:
        absent = [i for i in range(self._count) if i not in self._peers]
        came = ", ".join(self._called(i) for i in sorted(self._peers))
        word = "host" if len(absent) == 1 else "hosts"
        return (
            f"{word} {', '.join(map(str, absent))} of {self._count} did not come "
            f"within {self._join_timeout_s:.0f} s (config.train.join_timeout_s); "
            f"there: {came}{self._gate.turned_away()}"
        )

    def _called(self, index: int) -> str:
        return f"host {index} ({self._peers[index].name})"

    def _tell(self, message: dict[str, Any], but: tuple[int, ...] = ()) -> None:
        line = encode(message)
        for i, peer in self._peers.items():
            if i not in but and not peer.writer.is_closing():
                peer.writer.write(line)

    async def _end(self, line: str, code: int, teller: int = -1) -> None:
        """Tells all processes that the run is over, process 0 after the others."""
        if self._ended:
            return
        self._ended = True
        message = {"end": line, "code": code}
        self._tell(message, but=(0, teller))
        end = time.monotonic() + _FAREWELL_S
        while time.monotonic() < end and any(
            not peer.writer.is_closing() and not peer.gone
            for i, peer in self._peers.items()
            if i != 0
        ):
            await asyncio.sleep(0.05)
        if teller != 0:
            self._tell(message, but=tuple(range(1, self._count)))


def beat_s(host_timeout_s: float) -> float:
    """Seconds between two signs of life of a process."""
    return min(5.0, host_timeout_s / 6)


def silence_s(host_timeout_s: float) -> float:
    """Seconds of silence after which a process is lost: all end within the timeout."""
    return host_timeout_s - 2 * beat_s(host_timeout_s)


def silence(host_timeout_s: float) -> str:
    """Describes the loss of a process that keeps its connection but is silent."""
    return (
        f"nothing was heard of it for {silence_s(host_timeout_s):.0f} s "
        f"(config.train.host_timeout_s is {host_timeout_s:.0f})"
    )


def encode(message: dict[str, Any]) -> bytes:
    """Returns a message as a line of JSON."""
    return json.dumps(message).encode() + b"\n"


async def receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Returns the next message; an empty one at the end of the connection.

    Raises:
      ValueError: what came is no message.
    """
    line = await reader.readline()
    message = json.loads(line) if line.endswith(b"\n") else {}
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies bytes until the connection ends, then closes the other one."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
