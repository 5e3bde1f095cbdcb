"""Where the processes of a run meet and hear of each other: a server in process 0.

Each process keeps one connection to it, on which both sides send a JSON object a line.
A process that is killed closes its connection, one that freezes falls silent, one that
fails says so; whatever comes first ends all the others, with the same line. The same
port passes on what jax.distributed sends to its own service (see `hosts`).
"""

import asyncio
import dataclasses
import json
import time
from typing import Any

from mtp_jax.distributed.stop import NOTHING_BEGUN

_LINE_BYTES = 1 << 20
_REFUSAL_S = 30.0  # for all processes to hear that they do not fit together
_FAREWELL_S = 5.0  # for the others to hear the end before process 0 ends


@dataclasses.dataclass
class _Member:
    name: str
    about: dict[str, str]
    writer: asyncio.StreamWriter
    heard: float
    status: dict[str, Any] = dataclasses.field(default_factory=dict)
    gone: bool = False  # it has said goodbye


class Coordinator:
    """The server; all of it runs in one event loop."""

    def __init__(self, count: int, join_timeout_s: float, host_timeout_s: float):
        """Of `count` processes; see `config.train` for the times."""
        self._count = count
        self._join_timeout_s = join_timeout_s
        self._host_timeout_s = host_timeout_s
        self._members: dict[int, _Member] = {}
        self._met = False
        self._waiting: dict[str, set[int]] = {}  # who has come to which place
        self._begun: dict[int, int] = {}  # how far each has come, at a SIGTERM
        self._stopping = False
        self._arrived = 0
        self._refusal = ""  # why these processes cannot be a group
        self._ended = False
        self._service: int | None = None  # port of jax.distributed, on this machine
        self._tasks: set[asyncio.Task] = set()  # the event loop itself does not

    async def listen(self, host: str, port: int) -> None:
        """Begins to serve.

        Raises:
          OSError: the port is taken.
        """
        # Other hosts may know this one by another address than `host`.
        bind = host if host in ("127.0.0.1", "localhost") else None
        await asyncio.start_server(self._serve, bind, port, limit=_LINE_BYTES)
        self._spawn(self._watch())

    def open_service(self, port: int) -> None:
        """Says where the service of jax.distributed listens."""
        self._service = port

    def statuses(self) -> dict[int, dict[str, Any]]:
        """What each process last said of itself."""
        return {i: member.status for i, member in self._members.items()}

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            hello = await receive(reader)
            if hello.get("kind") == "service":
                await self._pass_on(reader, writer)
            elif hello.get("kind") == "host":
                await self._hear(hello, reader, writer)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # whoever it was does not speak this protocol
        finally:
            writer.close()

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
        member = _Member(
            hello["name"], hello["about"], writer, time.monotonic(), hello["status"]
        )
        self._arrived += 1
        wrong = self._refusal or self._wrong(index, int(hello["of"]), member)
        if wrong:
            writer.write(encode({"end": wrong, "code": 2}))
            if not self._refusal:
                self._refusal = wrong
                self._spawn(self._refuse())
            return
        self._members[index] = member
        if len(self._members) == self._count:
            self._met = True
            names = [self._members[i].name for i in range(self._count)]
            self._tell({"names": names})
        try:
            while message := await receive(reader):
                member.heard = time.monotonic()
                await self._take(index, member, message)
        except (OSError, ValueError):
            pass
        if not self._met:
            self._members.pop(index, None)  # it may yet come again
        elif not member.gone:
            await self._lose(index, "its process ended")

    async def _refuse(self) -> None:
        """Ends a meeting that came to nothing, but waits a while for all to hear it."""
        end = time.monotonic() + _REFUSAL_S
        while self._arrived < self._count and time.monotonic() < end:
            await asyncio.sleep(0.1)
        await self._end(self._refusal, 2)

    def _wrong(self, index: int, count: int, member: _Member) -> str:
        """What speaks against a process that wants to join; empty if nothing does."""
        if count != self._count or not 0 <= index < count:
            return (
                f"{member.name} came as process {index} of {count}, but process 0 "
                f"was told --num_processes={self._count}"
            )
        if other := self._members.get(index):
            return (
                f"two processes came as --process_id={index}, on {other.name} and on "
                f"{member.name}"
            )
        for there in self._members.values():
            for key in sorted(there.about.keys() | member.about.keys()):
                here, other_value = member.about.get(key), there.about.get(key)
                if here != other_value:
                    return (
                        f"the hosts differ in {key}: {member.name} has {here}, "
                        f"{there.name} {other_value}"
                    )
        return ""

    async def _take(self, index: int, member: _Member, message: dict[str, Any]) -> None:
        if "status" in message:
            member.status = message["status"]
        if "failed" in message:
            member.gone = True
            line = f"{self._called(index)}: {message['failed']}"
            await self._end(line, message["code"], teller=index)
            member.writer.write(encode({"told": True}))
        if "at" in message:
            there = self._waiting.setdefault(message["at"], set())
            there.add(index)
            if len(there) == self._count:
                del self._waiting[message["at"]]
                self._tell({"pass": message["at"]})
        if "stop" in message and not self._stopping:
            self._stopping = True
            self._tell({"how far": True})
        if "begun" in message:
            self._begun[index] = message["begun"]
            if len(self._begun) == self._count:
                await self._stop_after(max(self._begun.values()) + 1)
        if "bye" in message:
            member.gone = True
            if all(m.gone for m in self._members.values()):
                self._tell({"bye": True})

    async def _stop_after(self, step: int) -> None:
        """All have been asked; they end at once if there is nothing to save."""
        if step == 0:
            await self._end(NOTHING_BEGUN, 0)
        else:
            self._tell({"last": step})

    async def _watch(self) -> None:
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
            for i, member in list(self._members.items()):
                member.heard += asleep
                if not member.gone and now - member.heard > limit:
                    await self._lose(i, silence(self._host_timeout_s))

    async def _lose(self, index: int, how: str) -> None:
        self._members[index].gone = True  # nobody waits for it
        await self._end(f"{self._called(index)} is lost: {how}", 1)

    def _missing(self) -> str:
        absent = [i for i in range(self._count) if i not in self._members]
        came = ", ".join(self._called(i) for i in sorted(self._members))
        word = "host" if len(absent) == 1 else "hosts"
        return (
            f"{word} {', '.join(map(str, absent))} of {self._count} did not come "
            f"within {self._join_timeout_s:.0f} s (config.train.join_timeout_s); "
            f"there: {came}"
        )

    def _called(self, index: int) -> str:
        return f"host {index} ({self._members[index].name})"

    def _tell(self, message: dict[str, Any], but: tuple[int, ...] = ()) -> None:
        for i, member in self._members.items():
            if i not in but and not member.writer.is_closing():
                member.writer.write(encode(message))

    async def _end(self, line: str, code: int, teller: int = -1) -> None:
        """Tells all processes that the run is over, process 0 after the others."""
        if self._ended:
            return
        self._ended = True
        message = {"end": line, "code": code}
        self._tell(message, but=(0, teller))
        end = time.monotonic() + _FAREWELL_S
        while time.monotonic() < end and any(
            not member.writer.is_closing() and not member.gone
            for i, member in self._members.items()
            if i != 0
        ):
            await asyncio.sleep(0.05)
        if teller != 0:
            self._tell(message, but=tuple(range(1, self._count)))


def beat_s(host_timeout_s: float) -> float:
    """How often a process says that it is there, in seconds."""
    return min(5.0, host_timeout_s / 6)


def silence_s(host_timeout_s: float) -> float:
    """How long it may say nothing, in seconds: all are to end within the timeout."""
    return host_timeout_s - 2 * beat_s(host_timeout_s)


def silence(host_timeout_s: float) -> str:
    """How a process was lost that is still there."""
    return (
        f"nothing was heard of it for {silence_s(host_timeout_s):.0f} s "
        f"(config.train.host_timeout_s is {host_timeout_s:.0f})"
    )


def encode(message: dict[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps(message).encode() + b"\n"


async def receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next message; empty at the end of the connection.

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
