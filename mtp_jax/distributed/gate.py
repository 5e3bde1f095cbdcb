"""The port of process 0: where it listens, and who is let in."""

import asyncio
import contextlib
import errno
import ipaddress
import resource
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from mtp_jax.distributed.secret import VARIABLE, Denied, admit
from mtp_jax.errors import counted, warn

_LINE_BYTES = 1 << 15  # of a message to the coordinator
_PROOF_S = 10.0  # for a process to prove that it is one of the run's
_FILES = 256  # that a process has open besides its connections

Serve = Callable[
    [dict[str, Any], asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]
]


class Gate:
    """Takes connections, and passes on those of who knows the run's secret.

    Strangers are turned away and counted. They can neither fill the memory nor take
    all files: what they send is bounded, and so is their time and their number.
    """

    def __init__(self, secret: bytes, count: int, serve: Serve):
        """Has `serve` called with the hello of each process that is let in."""
        self._secret = secret
        self._serve = serve
        self._most = 2 * count + 64  # that have not proved anything yet
        self._open_files = 4 * count + self._most + _FILES
        self._unproved: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self.strangers = 0
        self._warned = False

    async def listen(self, host: str, port: int) -> None:
        """Begins to take connections.

        Raises:
          OSError: the port is taken.
        """
        _allow_files(self._open_files)
        await asyncio.start_server(
            self._take,
            _where_to_listen(host),
            port,
            limit=_LINE_BYTES,
            backlog=self._most,
        )

    def turned_away(self) -> str:
        """How many strangers came, as a part of a line; empty if none did."""
        if not self.strangers:
            return ""
        connections = counted(self.strangers, "connection")
        return f"; {connections} without the run's secret turned away"

    async def _take(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serves a connection, until it ends."""
        try:
            if (hello := await self._hello(reader, writer)) is not None:
                await self._serve(hello, reader, writer)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # it went, or it is of another version
        finally:
            writer.close()

    async def _hello(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> dict[str, Any] | None:
        """The hello of a process of this run; None for a stranger."""
        if len(self._unproved) >= self._most:  # a host of ours proves itself at once
            next(iter(self._unproved)).transport.abort()
        self._unproved[writer] = None
        try:
            return await asyncio.wait_for(admit(reader, writer, self._secret), _PROOF_S)
        except Denied:
            self._warn_once(writer.get_extra_info("peername"))
        except (OSError, ValueError):
            pass
        finally:
            self._unproved.pop(writer, None)
        self.strangers += 1
        return None

    def _warn_once(self, peer: Any) -> None:
        """Warns of a process with another secret, which may be a host of this run."""
        if not self._warned:
            self._warned = True
            warn(
                f"mtp-jax: a process on {peer[0] if peer else 'another host'} came "
                "with another secret and was turned away; hosts of one run share "
                f"--workdir, or {VARIABLE}"
            )


def _where_to_listen(host: str) -> list[str] | None:
    """Addresses to listen on, for hosts that know this one as `host`; None: on all.

    Loopback is always there, for process 0 itself. A name may mean another address
    elsewhere, and an address may be translated on its way.
    """
    if host in ("localhost", "127.0.0.1"):
        return ["127.0.0.1"]
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with socket.socket(family) as trial:
            try:
                trial.bind((host, 0))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
            else:
                return [host, "127.0.0.1"]
    return None


def _allow_files(count: int) -> None:
    """Raises the limit of open files of this process, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
