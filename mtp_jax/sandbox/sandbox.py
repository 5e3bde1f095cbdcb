"""Runs programs in sandboxes, several at a time, and returns their verdicts."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mtp_jax.errors import UserError
from mtp_jax.sandbox import bubblewrap
from mtp_jax.sandbox.programs import (
    FunctionTests,
    Limits,
    Program,
    ScriptTests,
    Verdict,
    processors,
    same_output,
)
from mtp_jax.sandbox.seccomp import denied_calls

_HERE = pathlib.Path(__file__).parent
_LONGEST_VERDICT = 1 << 16
_NO_ANSWER = b"EOFError: no answer"  # the judge's word for a program that is gone
_KILLED = 128 + signal.SIGKILL
# Python of the sandbox finds the modules in its first lines, as it can read no file.
_BEGIN = """
import json, os, sys, types
with os.fdopen(int(sys.argv[1]), "rb") as file:
    job = json.load(file)
for name, text in job["modules"].items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
sys.modules["mtp_jax.sandbox.guest"].limit(job["limits"])
"""
_SERVE = """
requests, answers = os.dup(0), os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0), os.dup2(null, 1)
sys.modules["mtp_jax.sandbox.guest"].serve(job, requests, answers)
"""
_JUDGE = """
sys.modules["mtp_jax.sandbox.judge"].judge(job, 0, 1, int(sys.argv[2]))
"""
_SCRIPT = """
sys.modules["mtp_jax.sandbox.guest"].run_script(job)
"""


class Sandbox:
    """A way to run programs; safe to use from several threads."""

    def __init__(self, limits: Limits | None = None, *, unsafe: bool = False):
        """Finds bubblewrap and an interpreter, and tries them.

        Args:
          limits: of each program; None for the usual ones.
          unsafe: run programs without a sandbox, as this user: they can read, write
            and send whatever this user can. Limits of time, memory and output hold.

        Raises:
          UserError: bubblewrap is not there, or does not work here.
        """
        self.limits = limits or Limits()
        self.unsafe = unsafe
        self.kind = "none" if unsafe else "bubblewrap"
        self._filter = b"" if unsafe else denied_calls()
        self._bwrap = bubblewrap.find_bwrap()
        self._as_nobody = os.getuid() == 0 and not unsafe
        if not unsafe and self._bwrap is None:
            raise UserError(
                "programs of a model run in a sandbox of bubblewrap's, which is not "
                "installed (apt install bubblewrap); --allow_unsafe_execution runs "
                "them without any, with all rights of this user."
            )
        if self._as_nobody and shutil.which("setpriv") is None:
            raise UserError(
                "the sandbox needs setpriv to leave the rights of root; install "
                "util-linux, or run as another user."
            )
        self.python = bubblewrap.find_interpreter(self._as_nobody)
        names = ("wire", "guest", "judge")
        self._modules = {"mtp_jax": "", "mtp_jax.sandbox": ""} | {
            f"mtp_jax.sandbox.{name}": (_HERE / f"{name}.py").read_text("utf-8")
            for name in names
        }
        self._try()

    def _try(self) -> None:
        """Judges a right and a wrong program.

        Raises:
          UserError: the verdicts are not what they should be.
        """
        tests = FunctionTests(("assert double(2) == 4",), ("double",))
        right = self.run(Program("def double(x): return 2 * x", tests))
        wrong = self.run(Program("def double(x): return x", tests))
        if not right.passed or wrong.passed:
            what = "Python" if self.unsafe else "bubblewrap"
            raise UserError(
                f"the sandbox does not work here: {what} said {self._complaint()!r}; "
                "in a container it needs user namespaces to be allowed."
            )

    def _complaint(self) -> str:
        """The first line of an attempt's errors."""
        with self._filter_fd() as seccomp:
            line = self._line(seccomp, "print(1)", [])
            done = subprocess.run(
                line,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                pass_fds=[seccomp],
                env={},
            )
        return (done.stderr.strip().splitlines() or ["nothing"])[0]

    def run_all(self, programs: Sequence[Program], workers: int = 0) -> list[Verdict]:
        """Verdicts in the order of the programs; `workers` at a time, 0: a processor
        each."""
        workers = workers or processors()
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self.run, programs))

    def run(self, program: Program) -> Verdict:
        """The verdict on one program."""
        if isinstance(program.tests, ScriptTests):
            return self._run_script(program.code, program.tests)
        return self._run_functions(program.code, program.tests)

    def _run_functions(self, code: str, tests: FunctionTests) -> Verdict:
        """Runs a program in one sandbox, and its judge in another."""
        job = {"setup": tests.setup, "names": tests.names, "tests": tests.tests}
        with contextlib.ExitStack() as stack:
            answers, requests, verdict = (stack.enter_context(_Pipe()) for _ in "123")
            guest = self._start(
                stack, _SERVE, {"code": code}, requests.read, answers.write
            )
            self._start(stack, _JUDGE, job, answers.read, requests.write, verdict.write)
            for end in (answers, requests):
                end.close()
            verdict.close_write()
            text, timely = _read(verdict.read, _LONGEST_VERDICT, self.limits.wall_s)
            early = _wait(guest, 0.2) if _NO_ANSWER in text else None
        if not timely:
            return Verdict(False, f"no verdict within {self.limits.wall_s:g} s")
        if early is not None:
            limit = (
                "a limit of time or memory" if early == _KILLED else f"itself: {early}"
            )
            return Verdict(False, f"the program was ended by {limit}")
        try:
            found = json.loads(text)
            return Verdict(found["passed"] is True, str(found["why"]))
        except (ValueError, TypeError, KeyError):
            return Verdict(False, "its tests were ended by a limit of time or memory")

    def _run_script(self, code: str, tests: ScriptTests) -> Verdict:
        """Runs a program on each input in a sandbox of its own, until one fails."""
        for number, (given, expected) in enumerate(tests.cases, start=1):
            with contextlib.ExitStack() as stack:
                output = stack.enter_context(_Pipe())
                stdin = stack.enter_context(
                    _memory_file(given.encode(errors="replace"))
                )
                process = self._start(
                    stack, _SCRIPT, {"code": code}, stdin, output.write
                )
                output.close_write()
                most = self.limits.output_bytes
                text, timely = _read(output.read, most + 1, self.limits.wall_s)
                status = process.poll() if not timely else _wait(process, 2.0)
            where = f"input {number}"
            if not timely:
                return Verdict(
                    False, f"{where}: no end within {self.limits.wall_s:g} s"
                )
            if len(text) > most:
                return Verdict(False, f"{where}: more than {most} bytes of output")
            if status != 0:
                return Verdict(False, f"{where}: exit code {status}")
            if not same_output(text.decode(errors="replace"), expected):
                return Verdict(False, f"{where}: another output")
        return Verdict(True, "")

    def _start(
        self,
        stack: contextlib.ExitStack,
        text: str,
        job: dict[str, Any],
        stdin: int,
        stdout: int,
        *pass_fds: int,
    ) -> subprocess.Popen[bytes]:
        """Starts Python in a sandbox, which ends with the stack.

        Args:
          stack: takes what is to be closed and ended.
          text: code after `_BEGIN`; its arguments are the job's descriptor, then
            `pass_fds`.
          job: data for it.
          stdin, stdout: descriptors.
          pass_fds: more descriptors.
        """
        limits = self.limits.resources(count_processes=not self.unsafe)
        whole = json.dumps({**job, "modules": self._modules, "limits": limits})
        with _memory_file(whole.encode()) as data, self._filter_fd() as seccomp:
            arguments = [str(data), *map(str, pass_fds)]
            process = subprocess.Popen(
                self._line(seccomp, _BEGIN + text, arguments),
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=[data, *pass_fds, *([] if self.unsafe else [seccomp])],
                start_new_session=True,
                env={},
            )
        stack.callback(_end, process)
        return process

    def _line(self, seccomp: int, text: str, arguments: list[str]) -> list[str]:
        flags = ["-I", "-S", "-B", "-c", text, *arguments]
        if self.unsafe:
            return [self.python.path, *flags]
        assert self._bwrap is not None
        line = bubblewrap.command(self._bwrap, self.python, seccomp, self._as_nobody)
        return [*line, *flags]

    @contextlib.contextmanager
    def _filter_fd(self) -> Iterator[int]:
        with _memory_file(self._filter) as number:
            yield number


class _Pipe:
    """Both ends of a pipe, closed at the end of a context."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self._open = {self.read, self.write}

    def __enter__(self) -> "_Pipe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is still open."""
        while self._open:
            os.close(self._open.pop())

    def close_write(self) -> None:
        """Closes the end to write to, which only the process has then."""
        self._open.remove(self.write)
        os.close(self.write)


@contextlib.contextmanager
def _memory_file(data: bytes) -> Iterator[int]:
    """A descriptor of a file without a name that holds some bytes, to be read."""
    number = os.memfd_create("data")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(number, view) :]
        os.lseek(number, 0, os.SEEK_SET)
        yield number
    finally:
        os.close(number)


def _read(number: int, most: int, seconds: float) -> tuple[bytes, bool]:
    """Reads to the end, or so many bytes; False if that took too long."""
    end, found = time.monotonic() + seconds, b""
    ready = select.poll()  # select knows no descriptors above 1023
    ready.register(number, select.POLLIN)
    while len(found) < most:
        left = end - time.monotonic()
        if left <= 0 or not ready.poll(1000 * left):
            return found, False
        part = os.read(number, 1 << 16)
        if not part:
            break
        found += part
    return found, True


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process that has closed its output; None: it goes on."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, all of its session, and its namespaces with it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
