"""How a process ends: told to by a signal, with the one that started it, or at once."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PARENT = "MTP_JAX_PARENT"  # in the environment of a program: to end with that process
_FLUSH_S = 1.0  # for what is printed to leave a process that ends at once
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_to_undo: list[Callable[[], None]] = []  # before this process ends by `exit_now`


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """A context at whose end the signals to stop are heard that came within it.

    For what must be done whole: a process that is started is one that has all it needs.
    In threads other than the main one, which hears no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    heard = [n for n in STOP_SIGNALS if callable(signal.getsignal(n))]
    before = {n: signal.signal(n, lambda n, _: came.append(n)) for n in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for heard_number in came:
            signal.raise_signal(heard_number)


def on_signals(
    numbers: Iterable[signal.Signals], act: Callable[[int, int], None]
) -> Callable[[], None]:
    """Has signals call `act` in a thread, whatever the main thread is blocked in.

    A handler of Python's waits for the main thread, which may compile for minutes. A
    byte in a socket does not; but the event loops of libraries may take that over for a
    while, so the handler sends one as well.

    Args:
      numbers: the signals. One that this process was started to ignore, as by nohup,
        is still ignored.
      act: takes a signal, and how many of its kind have come: 1 for the first.

    Returns:
      A function that puts back what was there before.
    """
    here, there = socket.socketpair()
    there.setblocking(False)
    heard = {
        int(n): int(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN
    }
    by_handler = {n | 0x80: n for n in heard}  # the other byte is of the same signal

    def listen(open_still: socket.socket) -> None:  # or its number is another file's
        counts = dict.fromkeys([*heard, *by_handler], 0)
        told = dict.fromkeys(heard, 0)
        while received := here.recv(64):
            for byte in received:
                if byte not in counts:
                    continue
                counts[byte] += 1
                number = by_handler.get(byte) or heard[byte]
                if counts[byte] > told[number]:
                    told[number] = counts[byte]
                    act(number, told[number])
        here.close()

    def handle(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):  # full: more than enough have come
            there.send(bytes([number | 0x80]))

    threading.Thread(target=listen, args=(there,), daemon=True).start()
    before = {n: signal.signal(n, handle) for n in heard}
    wakeup = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError):  # closed meanwhile
            signal.set_wakeup_fd(wakeup)
        there.close()

    return restore


def end_with_parent(parent: int) -> None:
    """Has Linux kill this process when the one that started it ends, in any way.

    Args:
      parent: its process id.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(128 + signal.SIGKILL)


def undo_at_exit(undo: Callable[[], None]) -> Callable[[], None]:
    """Has `exit_now` call a function, in whatever thread; returns what cancels that."""
    _to_undo.append(undo)
    return lambda: _to_undo.remove(undo)


def exit_now(code: int) -> NoReturn:
    """Ends the process without atexit, where jax.distributed waits for the others."""
    for undo in _to_undo:
        with contextlib.suppress(Exception):
            undo()

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    # Another thread may hold a stream, and wait for whoever reads the pipe.
    with contextlib.suppress(RuntimeError):  # the interpreter ends already
        flushing = threading.Thread(target=flush, daemon=True)
        flushing.start()
        flushing.join(_FLUSH_S)
    os._exit(code)
