"""A workdir as a folder: who holds it, its name, and how a new one is made whole."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any, TextIO

import jax
from etils import epath

from mtp_jax import __version__
from mtp_jax.config import TrainConfig
from mtp_jax.distributed import hosts
from mtp_jax.distributed.cluster import ProcessInfo, detect
from mtp_jax.errors import UserError
from mtp_jax.storage import absolute, is_remote, make_folder, write_atomically

_SEEN_S = 10.0  # what a network file system may take to show a new file
_STAYS = (".secret", ".lock", ".id")  # in a folder that is as good as empty


def identity(workdir: epath.Path) -> str:
    """The name of the run in a locked workdir; a folder made again gets another one."""
    return (workdir / ".id").read_text(encoding="utf-8").strip()


def lock(workdir: epath.Path, option: str) -> TextIO | None:
    """Keeps other runs out of a workdir until this process ends, however it ends.

    The lock is one of the file system: one that many hosts share must know locks (NFS 4
    and Lustre do). Object stores have none, and none is taken there.

    Args:
      workdir: the folder, which is there.
      option: by which it was given, for errors, as `--workdir=runs/mine`.

    Returns:
      The open file, which holds the lock until it is closed; None in an object store.

    Raises:
      UserError: another process holds it.
    """
    path, here = workdir / ".lock", f"process {os.getpid()} on {socket.gethostname()}\n"
    if is_remote(path):
        path.write_text(here)
        _write_identity(workdir)
        return None
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (held as the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(
            f"{option} is in use by {holder}; wait until it ends, or choose another "
            "workdir."
        ) from None
    except OSError:
        pass  # a file system without locks
    _write_identity(workdir)
    file.truncate(0)
    file.write(here)
    file.flush()
    return file


def _write_identity(workdir: epath.Path) -> None:
    """Gives the run in a workdir its name, if it has none."""
    path = workdir / ".id"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:12] + "\n")


def lock_for_all(workdir: epath.Path, option: str) -> TextIO | None:
    """Process 0 locks the workdir; the others see to it that it is the same folder.

    Args:
      workdir: the folder, which is there on process 0.
      option: by which it was given, for errors, as `--workdir=runs/mine`.

    Returns:
      What process 0 holds, as `lock` does; None on the others.

    Raises:
      UserError: another run holds it, or a host has another folder of that name.
    """
    held = lock(workdir, option) if jax.process_index() == 0 else None
    hosts.wait_for_all("the workdir is made and locked")
    seen = time.monotonic() + _SEEN_S
    while not (workdir / ".lock").exists():
        if time.monotonic() > seen:
            raise UserError(
                f"{option} is not the folder that host 0 has by that name; "
                "give one that all hosts share."
            )
        time.sleep(0.2)
    return held


@contextlib.contextmanager
def together(
    target: epath.Path,
    cluster: ProcessInfo | None,
    arguments: Any,
    waits: TrainConfig,
) -> Iterator[None]:
    """A context in which all processes of several make one new workdir.

    They join before, all must have the same arguments, an error of one ends all, and
    they part at the end. For a process alone it does nothing.

    Args:
      target: the workdir; the secret of the processes is beside it until it is made.
      cluster: which process of how many this is; None: what a TPU pod, GKE, Slurm or
        Open MPI says, or one process alone.
      arguments: what the verb was told, values and containers of them.
      waits: how long processes wait for each other, and for one that says nothing.

    Raises:
      UserError: the processes do not fit together, or have no secret.
      RunFailed: a process did not come, and which.
    """
    process = cluster or detect(waits.join_timeout_s)
    if process is None or process.num_processes == 1:
        yield
        return
    part = _part_of(target)
    text = json.dumps(arguments, sort_keys=True, default=str)
    about = {
        "mtp_jax": __version__,
        "jax": jax.__version__,
        "arguments": hashlib.sha256(text.encode()).hexdigest()[:12],
    }
    tidy: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if process.process_id == 0 and part != target:
        tidy = hosts.undone(functools.partial(_remove, part))
    with tidy:
        try:
            limits_s = waits.join_timeout_s, waits.host_timeout_s
            hosts.join(process, *limits_s, about, part)
            yield
            hosts.leave()
        except Exception as error:
            hosts.fail(error)
            raise


def refuse_taken(target: epath.Path, option: str) -> None:
    """Raises UserError if there is something at the place of a new workdir.

    Args:
      target: the workdir.
      option: by which it was given, for errors, as `--workdir=runs/mine`.
    """
    if not target.exists():
        return
    if not target.is_dir() or any(x.name not in _STAYS for x in target.iterdir()):
        raise UserError(f"{option} is not empty; give a new folder.")


@contextlib.contextmanager
def new_workdir(target: epath.Path, option: str) -> Iterator[epath.Path]:
    """A context with the folder to write a new workdir to, on all processes.

    It gets its name when it is whole, and is removed if that fails. In an object store,
    which knows no names of folders, it is `target` itself.

    Args:
      target: the workdir, from the root.
      option: by which it was given, for errors, as `--workdir=runs/mine`.

    Raises:
      UserError: there is something, another process makes one there, or the hosts do
        not share the folder.
    """
    part, first = _part_of(target), jax.process_index() == 0
    refuse_taken(target, option)
    if first:
        make_folder(part, option)
    with lock_for_all(part, option) or contextlib.nullcontext():
        tidy = hosts.undone(functools.partial(_remove, part))
        with tidy if first else contextlib.nullcontext():
            if first and part != target:
                _empty(part)
            hosts.wait_for_all("the new workdir is empty")
            yield part
            hosts.wait_for_all("the new workdir is whole")
            if first:
                _name(part, target, option)
        hosts.wait_for_all("the new workdir has its name")


def _part_of(target: epath.Path) -> epath.Path:
    """Where a workdir is until it is whole: beside its place, alike for all hosts."""
    if is_remote(target):
        return target
    target = absolute(target)
    return target.with_name(f".{target.name[:100]}.part")


def _empty(part: epath.Path) -> None:
    """Removes what another process left that was killed."""
    for path in part.iterdir():
        if path.name not in _STAYS:
            path.rmtree() if path.is_dir() else path.unlink()


def _name(part: epath.Path, target: epath.Path, option: str) -> None:
    (part / ".lock").unlink()
    if part != target:
        refuse_taken(target, option)
        if target.exists():
            target.rmtree()  # it is as good as empty
        part.rename(target)


def _remove(part: epath.Path) -> None:
    """Removes a folder, unless another process holds it."""
    with contextlib.suppress(OSError, UserError):
        if is_remote(part):
            part.rmtree()
            return
        with lock(part, "") or contextlib.nullcontext():
            for _ in range(5):  # a thread may still be writing there
                shutil.rmtree(part, ignore_errors=True)
                if not part.exists():
                    break
                time.sleep(0.1)
