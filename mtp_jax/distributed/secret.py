"""The secret that only the hosts of a run share, and how they prove that they have it.

It is that of the environment variable `MTP_JAX_SECRET`, else of the file `.secret` in
the workdir, which process 0 makes. It never crosses the network: each side of a
connection sends a number that nobody can foresee, and the other answers with a
keyed hash (HMAC-SHA256, RFC 2104) of it. What is sent afterwards is neither encrypted
nor signed: who can read or change what others send is not kept out.
"""

import asyncio
import contextlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Callable
from typing import Any

from etils import epath

from mtp_jax.errors import UserError
from mtp_jax.storage import is_remote

VARIABLE = "MTP_JAX_SECRET"
Secret = Callable[[], bytes | None]  # None: it is not there yet

_FILE = ".secret"
_SHORTEST = 16  # characters; an impostor could guess fewer from one proof
_WELCOME = b"mtp_jax 1 "  # begins the coordinator's first line
_DENIED = b"denied\n"


class Denied(Exception):
    """The other side has another secret, or this one has none yet."""


def secret_of(workdir: epath.Path | None, process_id: int) -> Secret:
    """Returns a function that looks up the secret, as a file may come late.

    Args:
      workdir: the folder of the run; None: only the environment tells.
      process_id: process 0 makes the file.

    Raises:
      UserError: the variable is too short, there is neither it nor a workdir, or
        process 0 cannot write there.
    """
    told = os.environ.get(VARIABLE, "").strip()
    if told:
        if len(told) < _SHORTEST:
            raise UserError(
                f"{VARIABLE} has {len(told)} characters; give at least {_SHORTEST}, as "
                "`openssl rand -hex 32` makes them, and the same on all hosts."
            )
        return lambda: told.encode()
    if workdir is None:
        raise UserError(
            f"{VARIABLE} is not set; hosts need a secret to find each other."
        )
    if process_id == 0:
        made = _make(workdir)
        return lambda: made
    return lambda: _read(workdir / _FILE)


def _make(workdir: epath.Path) -> bytes:
    """Returns the secret in a workdir; makes it if there is none, or others read it."""
    path = workdir / _FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = _read(path)
        if found is not None and (is_remote(path) or _is_private(path)):
            return found
        text = secrets.token_hex(32) + "\n"
        if is_remote(path):  # whoever may read the bucket may
            path.write_text(text)
        else:
            part = path.with_name(f"{_FILE}.{os.getpid()}")
            with open(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w"
            ) as f:
                f.write(text)
            part.replace(path)
    except OSError as error:
        reason = error.strerror or error
        message = f"--workdir={workdir} cannot be written: {reason}."
        raise UserError(message) from error
    return text.strip().encode()


def _is_private(path: epath.Path) -> bool:
    found = os.stat(path)
    return found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077


def _read(path: epath.Path) -> bytes | None:
    """The secret in a file; None if there is none (yet)."""
    try:
        return path.read_text(encoding="utf-8").strip().encode() or None
    except (OSError, ValueError):
        return None


async def greet(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    secret: Secret,
    hello: dict[str, Any],
) -> None:
    """Says hello to the coordinator; returns when both have proved their secret.

    Raises:
      Denied: its secret is another one, or this process knows none yet.
      OSError: the connection ended.
      ValueError: it is no coordinator.
    """
    welcome = await _line(reader)
    if not welcome.startswith(_WELCOME):
        raise ValueError("not a coordinator")
    known = await asyncio.to_thread(secret)
    if known is None:
        raise Denied
    body = json.dumps({**hello, "nonce": secrets.token_hex(16)}).encode() + b"\n"
    writer.write(body + _proof(known, b"member", welcome, body))
    answer = await _line(reader)
    if answer == _DENIED:
        raise Denied
    if not hmac.compare_digest(answer, _proof(known, b"coordinator", welcome, body)):
        raise ValueError("an impostor")


async def admit(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes
) -> dict[str, Any]:
    """Returns the hello of a process that has proved that it knows the secret.

    Nothing that comes before the proof is parsed.

    Raises:
      Denied: it does not know the secret.
      OSError, ValueError: it went, or sent more than a line may hold.
    """
    welcome = _WELCOME + secrets.token_hex(16).encode() + b"\n"
    writer.write(welcome)
    body = await _line(reader)
    proof = await _line(reader)
    if not hmac.compare_digest(proof, _proof(secret, b"member", welcome, body)):
        with contextlib.suppress(OSError):
            writer.write(_DENIED)
            await writer.drain()
        raise Denied
    hello = json.loads(body)
    writer.write(_proof(secret, b"coordinator", welcome, body))
    return hello


def _proof(secret: bytes, who: bytes, welcome: bytes, body: bytes) -> bytes:
    """A line that only who knows the secret can write, for this connection only."""
    message = b"".join([who, b"\n", welcome, body])
    return hmac.digest(secret, message, "sha256").hex().encode() + b"\n"


async def _line(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if not line.endswith(b"\n"):
        raise OSError(0, "the connection was closed")
    return line
