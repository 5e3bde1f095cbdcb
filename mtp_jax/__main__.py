"""The program: `python -m mtp_jax VERB`, also installed as `mtp-jax`."""

import contextlib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from mtp_jax.distributed.lifetime import (
    PARENT,
    STOP_SIGNALS,
    end_with_parent,
    exit_now,
    on_signals,
)
from mtp_jax.errors import (
    RunFailed,
    UserError,
    as_known,
    disk_errors_told,
    settle,
    told_as,
    warn,
)

_USAGE = """\
usage: mtp-jax VERB [options]

Multi-token prediction: train a model with n heads, and let it draft for itself.

  prepare   text, JSONL or code into a tokenized corpus
  count     how often tokens of a corpus follow each other, for dynamo
  import    a model of other people as a workdir
  train     train a model; the same command again continues the run
  grow      more, fewer or other heads for a model that is there
  export    a model in a format of other programs
  runs      list the runs under a folder: step, loss, how their configs differ
  evaluate  measure a trained model on held-out text, or on benchmarks
  generate  decode from a trained model
  verify    prove on a trained model that drafting changes nothing
  calibrate measure the heads and choose a tree of drafts
  audit     prove from a run's files which data it has seen
  plan      what a training step costs on a TPU, without one
  rehearse  faults of a pod, injected into a small run on this machine
  study     a claim about multi-token prediction, run and judged
  report    a page about runs: curves, tables, coloured text

mtp-jax VERB --help tells the options of a verb; mtp-jax --version tells the versions
that a bug report needs, and what else to send with it."""

_MODULES = {
    "prepare": "mtp_jax.cli.prepare",
    "count": "mtp_jax.cli.count",
    "import": "mtp_jax.cli.import_model",
    "train": "mtp_jax.cli.train",
    "grow": "mtp_jax.cli.grow",
    "export": "mtp_jax.cli.export",
    "runs": "mtp_jax.cli.runs",
    "evaluate": "mtp_jax.cli.evaluate",
    "generate": "mtp_jax.cli.generate",
    "verify": "mtp_jax.cli.verify",
    "calibrate": "mtp_jax.cli.calibrate",
    "audit": "mtp_jax.cli.audit",
    "plan": "mtp_jax.cli.plan",
    "rehearse": "mtp_jax.cli.rehearse",
    "study": "mtp_jax.cli.study",
    "report": "mtp_jax.cli.report",
}
_VERBS = tuple(_MODULES)
_TIDY = (
    "prepare",
    "import",
    "rehearse",
)  # verbs that remove or end something if interrupted


def program() -> int:
    """Runs a verb as `main`, in a process that ends then, and hears no more signals."""
    for number in STOP_SIGNALS:  # before a verb says what they mean to it, and after
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: _interrupted(number))
    try:
        return main()
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Runs a verb.

    The exit code is 0, 1 for a run that failed, 2 for bad input; as a shell has it, 130
    for Ctrl-C, and 141 where nobody reads the output any more.
    """
    parent = os.environ.pop(PARENT, "")  # the programs it starts have another
    if parent.isdecimal():
        end_with_parent(int(parent))
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a command line could go on
        from mtp_jax.cli.completion import complete

        complete(_MODULES)
    os.environ.setdefault("NPROC", str(_threads()))
    verb, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if verb in ("-h", "--help"):
        print(_USAGE)
        return 0
    if verb == "--version":
        from mtp_jax.cli.version import version_text

        print(version_text())
        return 0
    try:
        if verb not in _VERBS:
            raise UserError(f"{verb!r} is not a verb; there are {', '.join(_VERBS)}.")
        _require_folder()
        with disk_errors_told(f"what {verb} prints"):
            code = _run(verb, argv)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except (UserError, RunFailed) as error:
        code, shown, _ = told_as(error)
        warn(shown)
        return code
    except (MemoryError, RuntimeError, ValueError) as error:
        if as_known(error) is None:
            raise
        code, shown, _ = told_as(error)
        warn(shown)
        return code
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    finally:
        settle()


def _run(verb: str, argv: list[str]) -> int:
    """Runs a verb with what a signal means to it; returns its exit code."""
    if verb == "train":
        # Not before signals have a meaning: the import takes most of the start.
        from mtp_jax.distributed import hosts

        meaning = hosts.heeding_signals()
    elif verb in _TIDY:
        meaning = _unwinding()
    else:
        meaning = _ending_at_once()
    with meaning:
        return _main_of(verb)(argv)


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """A context in which Ctrl-C ends the process at once.

    A KeyboardInterrupt in the midst of compiled code can crash Python, or be lost.
    """
    restore = on_signals([signal.SIGINT], lambda number, count: _interrupted(number))
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """A context in which a signal has everything that is open closed, then ends it."""
    heard = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _unwind) for number in heard}
    try:
        yield
    except KeyboardInterrupt as interrupt:
        (number,) = interrupt.args or (signal.SIGINT,)
        _interrupted(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_folder() -> None:
    """Refuses to run in a folder that was removed: no relative path has a meaning."""
    try:
        os.getcwd()
    except OSError as error:
        text = f"the current directory cannot be used ({error.strerror})"
        raise UserError(f"{text}; change to one that exists.") from None


def _main_of(verb: str) -> Callable[[list[str]], int]:
    """The function that runs a verb."""
    return importlib.import_module(_MODULES[verb]).main


def _unwind(number: int, frame: object) -> None:
    """Has everything that is open closed; after that only Ctrl-C ends it at once."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    signal.signal(signal.SIGINT, lambda number, frame: _interrupted(number))
    raise KeyboardInterrupt(number)


def _interrupted(number: int) -> NoReturn:
    """Says that a signal came, and ends the process."""
    warn("mtp-jax: interrupted")
    exit_now(128 + number)


def _threads() -> int:
    """The number of threads of XLA's pool on CPUs.

    It runs the collectives of all local devices, by default on a thread a core; with
    fewer than two a device they may wait for each other for ever. More than that would
    only be in each other's way.
    """
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    match = re.search(flag, os.environ.get("XLA_FLAGS", ""))
    asked = os.environ.get("JAX_NUM_CPU_DEVICES") or (match[1] if match else "1")
    devices = int(asked) if asked.isdecimal() else 1  # JAX will say what is wrong
    return max(2 * devices, os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(program())
