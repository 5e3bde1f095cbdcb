"""Joining the processes of a run, and ending together: nobody waits for the dead.

Collectives, and jax.distributed, wait for a process that is lost, or abort with words
of their own. So each process has a thread (`member`) that hears from the others, by way
of the `coordinator`, and ends its process when the run is over elsewhere, whatever the
main thread is blocked in.
"""

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from etils import epath

from mtp_jax.distributed.cluster import ProcessInfo, detect
from mtp_jax.distributed.member import Member, exit_now
from mtp_jax.distributed.secret import secret_of
from mtp_jax.distributed.stop import NOTHING_BEGUN, LastStep, on_sigterm
from mtp_jax.errors import told_as


def join(
    process: ProcessInfo | None,
    join_timeout_s: int,
    host_timeout_s: int,
    about: dict[str, str] | None = None,
    workdir: epath.Path | None = None,
) -> None:
    """Joins the other processes, if there are any; to be called in the main thread.

    From then on SIGTERM ends a process only before its first step: see `told_to_stop`.

    Args:
      process: this process; None: what a TPU pod, GKE, Slurm or Open MPI says.
      join_timeout_s: how long to wait until all are there.
      host_timeout_s: within this time after a process is lost the others end.
      about: what must be the same in all processes, such as a version.
      workdir: a folder that all processes share, for their secret; made if there are
        several. Not needed where the environment tells the secret (`secret`).

    Raises:
      UserError: the processes do not fit together, or have no secret.
      RunFailed: a process did not come, and which.
    """
    global _member, _last_step
    on_sigterm(_stop)
    process = process or detect(join_timeout_s)
    if process is not None and process.num_processes > 1:
        secret = secret_of(workdir, process.process_id)
        member = Member(process, join_timeout_s, host_timeout_s, about or {}, secret)
        member.meet()
        _member, _last_step = member, member.last_step
        member.start_jax()
    else:
        _last_step = LastStep()


def report(**status: Any) -> None:
    """Sets the status of this process that process 0 knows."""
    if _member is not None:
        _member.report(status)


def reports() -> dict[int, dict[str, Any]]:
    """Returns the last status of each process; nothing but in process 0, or alone."""
    if _member is None or _member.coordinator is None:
        return {}
    return _member.coordinator.statuses()


def wait_for_all(barrier: str) -> None:
    """Waits until all processes are at this barrier, which its name tells from others.

    Collectives do not wait long for a process that still compiles.
    """
    if _member is not None:
        _member.wait_for_all(barrier)


def told_to_stop(done: int) -> bool:
    """Returns True if a process got a SIGTERM; all learn it after the same step.

    Where it comes before any process has called this, they end at once, with code 0.

    Args:
      done: steps done; to be called after each, and right before the first.
    """
    assert _last_step is not None, "join comes first"
    return _last_step.reached(done)


def _stop() -> None:
    """Acts on a SIGTERM: tells the others, or ends where no step has begun."""
    if _member is not None:
        _member.stop()
    elif _last_step is None or not _last_step.stop_alone():
        print(f"mtp-jax: {NOTHING_BEGUN}", file=sys.stderr, flush=True)
        exit_now(0)


def name_of(index: int) -> str:
    """Returns `host 2 (its name)` for process 2."""
    if _member is not None:
        return _member.name_of(index)
    return f"host {index} ({socket.gethostname()})"


def leave() -> None:
    """Ends a run that went well: waits until all processes have come to its end."""
    if _member is not None:
        _member.leave()


def fail(error: BaseException) -> None:
    """Tells the others of an error and ends this process; alone, it does nothing.

    An error that comes of a lost process is not told: the loss is.
    """
    if _member is not None:
        _member.fail(error)


@contextlib.contextmanager
def within(seconds: float, otherwise: BaseException) -> Iterator[None]:
    """A context that ends the run if its body takes longer than a limit.

    It is for what may wait for other processes for ever.

    Args:
      seconds: the limit.
      otherwise: the error that is told in that case, as by `fail`.
    """
    timer = threading.Timer(seconds, _give_up, (otherwise,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(error: BaseException) -> None:
    """Ends this process, alone or with the others, with an error."""
    fail(error)
    code, shown, _ = told_as(error)  # alone
    print(shown, file=sys.stderr, flush=True)
    exit_now(code)


_member: Member | None = None
_last_step: LastStep | None = None
