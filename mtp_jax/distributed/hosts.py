"""Joining the processes of a run, and ending together: nobody waits for the dead.

Collectives, and jax.distributed, wait for a process that is lost, or abort with words
of their own. So each process has a thread that hears from the others (`hub`) and ends
its process when the run is over elsewhere, whatever the main thread is blocked in.
"""

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from mtp_jax.distributed.cluster import Cluster, detected
from mtp_jax.distributed.member import Member, exit_now
from mtp_jax.distributed.stop import NOTHING_BEGUN, LastStep, on_sigterm
from mtp_jax.errors import told_as


def join(
    place: Cluster | None,
    join_timeout_s: int,
    host_timeout_s: int,
    about: dict[str, str] | None = None,
) -> None:
    """Joins the other processes, if there are any; to be called in the main thread.

    From then on SIGTERM ends a process only before its first step: see `told_to_stop`.

    Args:
      place: of this process; None: what a TPU pod, GKE, Slurm or Open MPI says.
      join_timeout_s: how long to wait until all are there.
      host_timeout_s: within this time after a process is lost the others end.
      about: what must be the same in all processes, such as a version.

    Raises:
      UserError: the processes do not fit together.
      RunFailed: a process did not come, and which.
    """
    global _watch, _last_step
    on_sigterm(_stop)
    place = place or detected(join_timeout_s)
    if place is not None and place.num_processes > 1:
        watch = Member(place, join_timeout_s, host_timeout_s, about or {})
        watch.meet()
        _watch, _last_step = watch, watch.last_step
        watch.start_jax()
    else:
        _last_step = LastStep()


def report(**status: Any) -> None:
    """What this process says of itself to process 0, from now on."""
    if _watch is not None:
        _watch.report(status)


def reports() -> dict[int, dict[str, Any]]:
    """In process 0: what each process said last; elsewhere, and alone, nothing."""
    return _watch.hub.statuses() if _watch is not None and _watch.hub else {}


def wait_for_all(place: str) -> None:
    """Waits until all processes are at this place of the program.

    Collectives do not wait long for a process that still compiles.
    """
    if _watch is not None:
        _watch.wait_for_all(place)


def told_to_stop(done: int) -> bool:
    """Whether a process got a SIGTERM; all learn it after the same number of steps.

    Where it comes before any process has called this, they end at once, with code 0.

    Args:
      done: steps done; to be called after each, and right before the first.
    """
    assert _last_step is not None, "join comes first"
    return _last_step.reached(done)


def _stop() -> None:
    """On SIGTERM."""
    if _watch is not None:
        _watch.stop()
    elif _last_step is None or not _last_step.stop_alone():
        print(f"mtp-jax: {NOTHING_BEGUN}", file=sys.stderr, flush=True)
        exit_now(0)


def name_of(index: int) -> str:
    """`host 2 (its name)`."""
    if _watch is not None:
        return _watch.name_of(index)
    return f"host {index} ({socket.gethostname()})"


def leave() -> None:
    """At the end of a run that went well: waits until all processes are there too."""
    if _watch is not None:
        _watch.leave()


def fail(error: BaseException) -> None:
    """Tells the others of an error and ends this process; alone, it does nothing.

    An error that comes of a lost process is not told: the loss is.
    """
    if _watch is not None:
        _watch.fail(error)


@contextlib.contextmanager
def within(seconds: float, otherwise: BaseException) -> Iterator[None]:
    """A limit for what may wait for other processes for ever: then the run ends.

    Args:
      seconds: the limit.
      otherwise: what is said in that case, as by `fail`.
    """
    timer = threading.Timer(seconds, _give_up, (otherwise,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(error: BaseException) -> None:
    fail(error)
    code, shown, _ = told_as(error)  # alone
    print(shown, file=sys.stderr, flush=True)
    exit_now(code)


_watch: Member | None = None
_last_step: LastStep | None = None
