"""Joining the processes of a run, and ending together: nobody waits for the dead.

Collectives, and jax.distributed, wait for a process that is lost, or abort with words
of their own. So each process has a thread (`member`) that hears from the others, by way
of the `coordinator`, and ends its process when the run is over elsewhere, whatever the
main thread is blocked in.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from etils import epath

from mtp_jax.distributed.cluster import ProcessInfo, detect
from mtp_jax.distributed.lifetime import (
    STOP_SIGNALS,
    exit_now,
    on_signals,
    undo_at_exit,
)
from mtp_jax.distributed.member import Member
from mtp_jax.distributed.secret import secret_of
from mtp_jax.distributed.stop import NOTHING_BEGUN, LastStep
from mtp_jax.errors import told_as, warn


@contextlib.contextmanager
def heeding_signals() -> Iterator[None]:
    """A context in which SIGTERM, SIGHUP and Ctrl-C mean: save once and stop.

    See `told_to_stop`. A second Ctrl-C ends this process at once, with code 130. To be
    entered in the main thread; inside another one it changes nothing.
    """
    global _heeding, _told_early, _last_step
    if _heeding:
        yield
        return
    _heeding, _told_early, _last_step = True, False, None
    restore = on_signals(STOP_SIGNALS, _stop)
    try:
        yield
    finally:
        restore()
        _heeding = False


def join(
    process: ProcessInfo | None,
    join_timeout_s: int,
    host_timeout_s: int,
    about: dict[str, str] | None = None,
    workdir: epath.Path | None = None,
) -> None:
    """Joins the other processes, if there are any.

    One that was told to stop before tells the others, and ends here with code 0.

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
    global _member, _joining, _last_step
    process = process or detect(join_timeout_s)
    if process is not None and process.num_processes > 1:
        secret = secret_of(workdir, process.process_id)
        member = Member(process, join_timeout_s, host_timeout_s, about or {}, secret)
        _joining, _last_step = member, member.last_step
        if _told_early:
            member.stop()
        member.meet()
        _member = member
        member.start_jax()
    else:
        _last_step = LastStep()
        if _told_early:
            _end_unbegun()


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
    """Returns True if a process was told to stop; all learn it after the same step.

    Where that is before any process has called this, they end at once, with code 0.

    Args:
      done: steps done; to be called after each, and right before the first.
    """
    assert _last_step is not None, "join comes first"
    return _last_step.reached(done)


def _stop(number: int, count: int) -> None:
    """Acts on a signal: tells the others, or ends where no step has begun."""
    global _told_early
    by_hand = number == signal.SIGINT
    if by_hand and (count > 1 or _last_step is None):
        warn("mtp-jax: interrupted")
        exit_now(128 + number)
    if by_hand and _last_step is not None and _last_step.has_begun():
        warn("mtp-jax: told to stop: saves first; Ctrl-C again ends at once, unsaved")
    if _joining is not None:
        _joining.stop()
        if count > 1 and not _joining.names:
            _end_unbegun()
    elif _last_step is None and count == 1:
        _told_early = True  # others that are waited for have to hear it
    elif _last_step is None or not _last_step.stop_alone():
        _end_unbegun()


def _end_unbegun() -> NoReturn:
    """Ends a process before its first step."""
    warn(f"mtp-jax: {NOTHING_BEGUN}")
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
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """A context that calls a function if its body is not left in peace.

    Where this process is one of several it is called when the process ends, by its own
    error (`fail`), by that of another one or by a signal: process 0 ends last, so that
    nobody else still makes what it undoes. It may be called in another thread.
    """
    cancel = undo_at_exit(undo)
    try:
        yield
    except BaseException as error:
        if _member is None or not isinstance(error, Exception):
            cancel()
            undo()
        raise
    cancel()


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
    warn(shown)
    exit_now(code)


_member: Member | None = None  # once all have met
_joining: Member | None = None  # from before that on
_heeding = False
_told_early = False  # to stop, before `join`
_last_step: LastStep | None = None
