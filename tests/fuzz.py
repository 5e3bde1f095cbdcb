"""Bad inputs and settings by the hundred: every verb, and a judge of what comes of it.

`python tests/fuzz.py --cases=500 --seed=1` prints a summary and every failure with its
command; `--only=N` runs case N alone and shows what it printed.
"""

import argparse
import atexit
import collections
import contextlib
import dataclasses
import gc
import io
import json
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).parent.parent
OLD_RUN = ROOT / "tests" / "data" / "run_format_0"
CACHE = ROOT / ".pytest_cache" / "jax"
LIMIT_S = 60
SURROUNDINGS = {
    "NPROC": "2",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "TERM": "dumb",
}
MEMORY = 16 << 30
STOPPED = (0, 129, 130, 143, -signal.SIGHUP, -signal.SIGTERM, -signal.SIGKILL)


@dataclasses.dataclass
class Outcome:
    """What a command did: exit code, minus the number of a signal; its output."""

    code: int | None  # None: it did not end
    out: str
    err: str


def import_all():
    """Imports what the verbs import, so that a fork can begin at once."""
    import mtp_jax.checkpoint.restore
    import mtp_jax.cli.decoder_args
    import mtp_jax.decode.calibrate
    import mtp_jax.decode.generator
    import mtp_jax.eval.heldout
    import mtp_jax.planning.plan
    import mtp_jax.rehearsal.rehearsal
    import mtp_jax.reports.compare
    import mtp_jax.reports.report
    import mtp_jax.run.audit
    import mtp_jax.run.train
    import mtp_jax.verification.verifier  # noqa: F401

    gc.freeze()


def run_forked(case, folder, environment):
    """Runs a case in a fork of this process, which has no thread of JAX yet."""
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(ready)
            code = _as_program(case, folder, environment, begun)
        finally:
            os._exit(code)
    os.close(begun)
    if case.stop is not None:
        select.select([ready], [], [], LIMIT_S)
        time.sleep(case.stop[1])
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, case.stop[0])
    code = _wait(child)
    os.close(ready)
    return code


def _as_program(case, folder, environment, begun):
    """The life of `python -m mtp_jax` after its imports, in a child."""
    os.setpgid(0, 0)
    os.chdir(folder / "in")
    os.environ.update({k: v for k, v in environment.items() if v is not None})
    for name in [k for k, v in environment.items() if v is None]:
        os.environ.pop(name, None)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    streams = {0: "/dev/null", 1: folder / "out", 2: folder / "err"}
    for number, path in streams.items():
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    case.around()
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        try:
            raw = io.FileIO(number, "w" if number else "r", closefd=False)
        except OSError:
            setattr(sys, name, None)
            continue
        buffer = io.BufferedWriter(raw) if number else io.BufferedReader(raw)
        errors = "backslashreplace" if number == 2 else "strict"
        setattr(
            sys, name, io.TextIOWrapper(buffer, "utf-8", errors, write_through=False)
        )
    from mtp_jax import __main__

    sys.argv = ["mtp-jax", *case.argv]
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does
    os.write(begun, b".")
    try:
        code = __main__.main()
    except SystemExit as leaving:
        code = leaving.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 0 if code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError as error:
                os.write(2, f"Exception ignored: {error}\n".encode())
                code = 120
    return code


def _wait(child):
    """Exit code of a child, minus a signal; None if it had to be killed."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_fresh(case, folder, environment):
    """Runs a case as a program of its own, for what Python reads when it starts."""
    kept = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "mtp_jax", *case.argv],
            cwd=folder / "in",
            env=kept | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            preexec_fn=case.around,
        )
        try:
            return process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def run_case(case, folder):
    """Runs a case in an empty folder; returns its outcome and what is wrong with it."""
    inside = folder / "in"
    inside.mkdir(parents=True)
    for name in ("run", "corpus"):
        shutil.copytree(OLD_RUN / name, inside / name)
    for path in (OLD_RUN / "config.py", *(ROOT / "tests" / "data").glob("*.*")):
        shutil.copy(path, inside)
    case.arrange(inside)
    before = _files(inside)
    environment = {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        **case.environment,
    }
    run = run_fresh if case.fresh else run_forked
    code = run(case, folder, environment)
    out, err = (
        path.read_text(errors="replace") if path.is_file() else ""
        for path in (folder / "out", folder / "err")
    )
    outcome = Outcome(code, out, err)
    wrong = judge(case, outcome, inside, before)
    for path in [p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()]:
        path.chmod(0o700)
    return outcome, wrong


def _files(folder):
    """By path, what changes with a file's content."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            state = path.lstat()
            is_dir = path.is_dir() and not path.is_symlink()
            found[path] = None if is_dir else (state.st_size, state.st_mtime_ns)
    return found


def judge(case, outcome, folder, before):
    """The fault of an outcome, in a line; None if there is none."""
    code, err = outcome.code, outcome.err
    if code is None:
        return f"hangs: not at its end after {LIMIT_S} s"
    for text in (outcome.out, err):
        if "Traceback (most recent call last)" in text:
            return "traceback: " + text.strip().splitlines()[-1][:200]
        if "Exception ignored" in text or "Fatal Python error" in text:
            return "noise of Python: " + text.strip().splitlines()[0][:200]
    allowed = {"refused": (2,), "fine": (0,), "either": (0, 1, 2)}[case.expect]
    allowed += (*STOPPED, 1) if case.stop else case.also
    if code == 0 and case.expect == "refused" and not case.stop:
        return "silent success"
    if code not in allowed:
        return f"code {code} where {case.expect} is due: {err.strip()[-200:]}"
    told = [line for line in err.splitlines() if line.startswith("mtp-jax: error: ")]
    if code == 2 and not case.quiet:
        if len(err.splitlines()) != 1 and len(told) != 1:
            return f"{len(err.splitlines())} lines on stderr: {err[:300]!r}"
        if not told:
            return f"not told as an error: {err[:300]!r}"
        if len(err) > 2500:
            return f"a line of {len(err)} characters"
    after = _files(folder)
    changed = [p for p, state in after.items() if before.get(p, 0) != state]
    gone = [p for p in before if p not in after]
    if code == 2 and case.expect == "refused" and (changed or gone):
        return f"refused, but wrote or removed {[str(p) for p in (changed + gone)][:3]}"
    if code == 0 and not case.stop:
        for name in case.due:
            if not (folder / name).exists():
                return f"silent success: {name} is not there"
    if fault := case.check(folder, outcome):
        return fault
    return next(filter(None, (_partial(p, before, outcome) for p in changed)), None)


def _partial(path, before, outcome):
    """A fault of a new or changed file, if it has a final name and is no whole one."""
    if any(part.startswith(".") or "tmp" in part for part in path.parts[-4:]):
        return None
    try:
        if path.suffix == ".json" and path.is_file():
            json.loads(path.read_text())
        elif path.suffix == ".npz" and path.is_file():
            import numpy as np

            with np.load(path) as arrays:
                for name in arrays.files:
                    arrays[name]
        elif path.name == "manifest.json.part":
            return "partial output"
        elif path.suffix == ".jsonl" and path.is_file():
            lines = path.read_text().split("\n")
            lines = lines[:-1] if outcome.code == -signal.SIGKILL else lines
            for line in filter(None, lines):
                json.loads(line)
        elif path.suffix in (".tokens", ".offsets") and before.get(path.parent, 0) == 0:
            if not (path.parent / "manifest.json").exists():
                return f"partial output: {path.parent} has no manifest"
        elif path.is_dir() and path.parent.name == "checkpoints":
            ends = [*path.glob("*commit*"), *path.glob("_CHECKPOINT_METADATA")]
            return None if ends else f"partial output: {path} is not committed"
    except Exception as error:
        return f"partial output: {path}: {error}"
    return None


def run_all(numbers, seed, fast=False, show=lambda number, case, outcome, wrong: None):
    """Runs cases; returns (number, case, fault) of those with one, and all kinds."""
    from fuzz_cases import case_of

    import_all()
    failures, kinds = [], collections.Counter()
    base = pathlib.Path(tempfile.mkdtemp(prefix="fuzz"))  # which no fork removes
    base.chmod(0o755)
    try:
        for number in numbers:
            case = case_of(random.Random(f"{seed}:{number}"))
            if fast and not case.fast:
                continue
            outcome, wrong = run_case(case, base / str(number))
            kinds[case.kind] += 1
            show(number, case, outcome, wrong)
            if wrong:
                failures.append((number, case, wrong))
            shutil.rmtree(base / str(number), ignore_errors=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return failures, kinds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, action="append", help="these numbers")
    parser.add_argument("--fast", action="store_true", help="only those")
    args = parser.parse_args()
    began = time.monotonic()
    last = [began]

    def show(number, case, outcome, wrong):
        now = time.monotonic()
        seconds, last[0] = now - last[0], now
        if args.only:
            print(f"{case}\ncode {outcome.code}\n{outcome.out}\n{outcome.err}")
        elif seconds > 10 and not wrong:
            print(f"  ({number} took {seconds:.0f} s: {case.told()})", flush=True)
        if wrong:
            print(f"{number} {case.told()}\n    {wrong}", flush=True)

    failures, kinds = run_all(
        args.only or range(args.cases), args.seed, args.fast, show
    )
    seconds = time.monotonic() - began
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(
        f"{sum(kinds.values())} cases ({told}), {len(failures)} failed, {seconds:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ |= SURROUNDINGS  # before JAX is imported
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.exit(main())
