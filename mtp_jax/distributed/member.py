"""One process of a run: it hears from the others, by the coordinator, in a thread."""

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
import time
from typing import Any, NoReturn

from mtp_jax.distributed.cluster import ProcessInfo
from mtp_jax.distributed.coordinator import (
    Coordinator,
    beat_s,
    encode,
    pump,
    receive,
    silence,
    silence_s,
)
from mtp_jax.distributed.lifetime import exit_now
from mtp_jax.distributed.secret import VARIABLE, Denied, Secret, greet
from mtp_jax.distributed.stop import NOTHING_BEGUN, LastStep
from mtp_jax.errors import RunFailed, UserError, told_as, warn

_SECRET_S = 30.0  # what a network file system may take to show a new secret
_UNHEARD_S = 10.0  # for process 0 to come and hear that this one is told to stop
_VERDICT_S = 5.0  # for the news of a lost host to come after a collective broke


class Member:
    """This process as a member of its run: a thread with an event loop."""

    def __init__(
        self,
        process: ProcessInfo,
        join_timeout_s: float,
        host_timeout_s: float,
        about: dict[str, str],
        secret: Secret,
    ):
        self._process = process
        self._join_timeout_s = join_timeout_s
        self._host_timeout_s = host_timeout_s
        self._about = about
        self._secret = secret
        self.coordinator: Coordinator | None = None
        self.names: list[str] = []
        self.status: dict[str, Any] = {}
        self.last_step = LastStep()
        self._loop = asyncio.new_event_loop()
        self._reader: asyncio.StreamReader
        self._writer: Any = None  # an asyncio.StreamWriter, once there is one
        self._heard = time.monotonic()
        self._last_word = threading.Lock()  # one line of a process tells its end
        self._failing = False  # and says why
        self._ending = False  # with what another process said
        self._stopping = False  # was told to, and tells it
        self._barriers: dict[str, threading.Event] = {}
        self._told = threading.Event()
        self._over = threading.Event()  # all processes have left
        self._relay_port = 0
        self._warned = False  # that the name of host 0 is not known
        self._tasks: list[Any] = []

    def meet(self) -> None:
        """Waits for all processes, and watches them from then on."""
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._meet(), self._loop).result()
        for part in (self._listen(), self._beat()):
            task = asyncio.run_coroutine_threadsafe(part, self._loop)
            task.add_done_callback(self._refuse_deafness)
            self._tasks.append(task)

    def report(self, status: dict[str, Any]) -> None:
        """Sends the status of this process to process 0 (`hosts.report`)."""
        self.status = status
        self._send({"status": status})

    def wait_for_all(self, barrier: str) -> None:
        """Waits until all processes are at a barrier (`hosts.wait_for_all`)."""
        passed = self._barriers.setdefault(barrier, threading.Event())
        self._send({"at": barrier})
        passed.wait()
        del self._barriers[barrier]

    def stop(self) -> None:
        """Tells the others that this process is to stop; also before all have met."""
        self._stopping = True
        if self._writer is not None:
            self._send({"stop": True})

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others of an error and ends this process (`hosts.fail`)."""
        code, shown, line = told_as(error)
        is_told = isinstance(error, UserError | RunFailed)
        if not is_told and isinstance(error, Exception):  # no person at a keyboard
            time.sleep(_VERDICT_S)  # a verdict ends this process meanwhile
        with self._last_word:
            self._failing = not self._ending
        if self._ending:
            threading.Event().wait()  # for the end, which is near
        warn(shown)
        self._send({"failed": line, "code": code})
        self._told.wait(10.0)
        exit_now(code)

    def leave(self) -> None:
        """Waits until all processes have come to the end (`hosts.leave`)."""
        import jax

        jax.distributed.shutdown()
        self._send({"bye": True})
        self._over.wait(self._host_timeout_s)

    def name_of(self, index: int) -> str:
        """Returns the number and the host name of a process (`hosts.name_of`)."""
        return f"host {index} ({self.names[index]})"

    async def _meet(self) -> None:
        process, address = self._process, self._process.coordinator_address
        host, port = _address(address)
        if process.process_id == 0:
            self.coordinator = Coordinator(
                process.num_processes,
                self._join_timeout_s,
                self._host_timeout_s,
                self._secret() or b"",
            )
            try:
                await self.coordinator.listen(host, port)
            except OSError as error:
                raise UserError(
                    f"process 0 cannot listen on port {port}: {error.strerror}; give "
                    "--coordinator another one."
                ) from None
            host = "127.0.0.1"
        end = time.monotonic() + self._join_timeout_s
        denied = None  # since when
        while not self.names:
            try:
                await self._greet(host, port, end)
            except Denied:
                if self._stopping:  # who denies this process would not listen to it
                    self._end(NOTHING_BEGUN, 0)
                denied = denied or time.monotonic()
                if time.monotonic() > denied + _SECRET_S:
                    raise UserError(
                        f"host 0, at {address}, has another secret than this host; "
                        "give a --workdir that all hosts share, or the same "
                        f"{VARIABLE} to all."
                    ) from None
                await asyncio.sleep(0.3)
            except ValueError:
                raise RunFailed(
                    f"what listens at {address} is not host 0 of a run; give "
                    "--coordinator another port."
                ) from None
            except OSError as error:
                self._warn_once(error)
                if self._stopping:  # there is nobody to tell, or not for long
                    end = min(end, time.monotonic() + _UNHEARD_S)
                if self._stopping and time.monotonic() > end:
                    self._end(NOTHING_BEGUN, 0)
                if time.monotonic() > end:
                    reason = getattr(error, "strerror", None) or "no answer"
                    raise RunFailed(
                        f"host 0 did not come within {self._join_timeout_s:.0f} s "
                        f"(config.train.join_timeout_s): {address}, where it "
                        f"should listen, says: {reason}"
                    ) from None
                await asyncio.sleep(0.3)
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self._relay_port = server.sockets[0].getsockname()[1]

    def _warn_once(self, error: OSError) -> None:
        """Warns, once, of a host name that is not known.

        It may come to be known while hosts start; a wrong one never will.
        """
        if isinstance(error, socket.gaierror) and not self._warned:
            self._warned = True
            address = self._process.coordinator_address
            warn(
                f"mtp-jax: {address}: {error.strerror}; trying again for "
                f"{self._join_timeout_s:.0f} s (config.train.join_timeout_s)"
            )

    async def _greet(self, host: str, port: int, end: float) -> None:
        """Says hello and waits for the names of all.

        Raises:
          OSError: no answer yet; to be tried again.
          UserError, RunFailed: the coordinator has ended the run.
        """
        opening = asyncio.open_connection(host, port, limit=1 << 20)
        reader, writer = await asyncio.wait_for(opening, 10.0)
        hello = {
            "kind": "host",
            "host": self._process.process_id,
            "of": self._process.num_processes,
            "name": socket.gethostname(),
            "about": self._about,
            "status": self.status,
        }
        try:
            await asyncio.wait_for(greet(reader, writer, self._secret, hello), 10.0)
        except BaseException:
            writer.close()
            raise
        # Not before: what this process has to say comes after the proof.
        self._reader, self._writer = reader, writer
        if self._stopping:
            self._writer.write(encode({"stop": True}))
        # The coordinator has the last word on who is missing.
        limit = end - time.monotonic() + 2 * self._host_timeout_s
        message = await asyncio.wait_for(receive(self._reader), limit)
        if message.get("code") == 0:
            self._end(message["end"], 0)
        if "end" in message:
            raise (UserError if message["code"] == 2 else RunFailed)(message["end"])
        if "names" not in message:
            self._writer.close()
            raise OSError(0, message.get("busy", "the connection was closed"))
        self.names = message["names"]

    def start_jax(self) -> None:
        """Starts jax.distributed, through a relay that hides the loss of process 0.

        Its client would abort the process at once, with a text of its own. Its times
        are longer than ours for the same reason.
        """
        import jax

        # What waits for a SIGTERM there stops Python meanwhile, and with it the relay.
        jax.config.update("jax_enable_preemption_service", False)
        process, bind, address = self._process, None, f"127.0.0.1:{self._relay_port}"
        if self.coordinator is not None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            bind = address = f"127.0.0.1:{port}"
            self._loop.call_soon_threadsafe(self.coordinator.open_service, port)
        long_s = int(100 + 3 * self._host_timeout_s)
        jax.distributed.initialize(
            address,
            process.num_processes,
            process.process_id,
            local_device_ids=process.local_device_ids,
            cluster_detection_method="deactivate",
            coordinator_bind_address=bind,
            initialization_timeout=long_s,
            heartbeat_timeout_seconds=long_s,
            shutdown_timeout_seconds=long_s,
        )

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Passes on a connection of jax.distributed to process 0."""
        host, port = _address(self._process.coordinator_address)
        try:
            there = await asyncio.open_connection(host, port)
            await greet(*there, self._secret, {"kind": "service"})
            down = asyncio.ensure_future(_pump_and_hold(there[0], writer))
            await pump(reader, there[1])
            down.cancel()
        except (OSError, ValueError, Denied):
            await asyncio.sleep(self._host_timeout_s)  # `_beat` has the word
        finally:
            writer.close()

    async def _listen(self) -> None:
        """Acts on the coordinator's messages; their end is the loss of process 0."""
        while True:
            try:
                message = await receive(self._reader)
            except (OSError, ValueError):
                message = {}
            self._heard = time.monotonic()
            if "end" in message:
                self._end(message["end"], message["code"])
            if "how far" in message:
                self._writer.write(encode({"begun": self.last_step.ask()}))
            if "last" in message:
                self.last_step.tell(message["last"])
            if "told" in message:
                self._told.set()
            if "pass" in message:
                self._barriers[message["pass"]].set()
            if "bye" in message:
                self._over.set()
            if not message:
                break
        if not self._over.is_set() and not self._told.is_set():
            self._end(f"{self.name_of(0)} is lost: its process ended", 1)

    async def _beat(self) -> None:
        """Sends signs of life, and ends this process where none come back."""
        pause = beat_s(self._host_timeout_s)
        limit = silence_s(self._host_timeout_s)
        before = time.monotonic()
        while not self._over.is_set():
            self._writer.write(encode({"status": self.status}))
            await asyncio.sleep(pause)
            now = time.monotonic()
            # While this process itself did not run it could hear nothing.
            self._heard += now - before - pause
            before = now
            if self.coordinator is None and now - self._heard > limit:
                how = silence(self._host_timeout_s)
                self._end(f"{self.name_of(0)} is lost: {how}", 1)

    def _refuse_deafness(self, task: concurrent.futures.Future) -> None:
        """Ends this process where a bug ended what hears of the others."""
        if not task.cancelled() and (error := task.exception()) is not None:
            code, shown, _ = told_as(error)
            warn(shown)
            exit_now(code)

    def _end(self, line: str, code: int) -> None:
        with self._last_word:
            self._ending = not self._failing
        if self._failing:
            self._told.set()
            return
        warn(f"mtp-jax: {line}")
        exit_now(code)

    def _send(self, message: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._writer.write, encode(message))


async def _pump_and_hold(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Copies bytes like `pump`, but leaves the other connection open at the end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
