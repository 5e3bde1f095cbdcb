"""Programs that nobody trusts: what they cannot do, verdicts they cannot forge."""

import os
import pathlib
import shutil
import socket
import subprocess
import time

import hostile
import pytest

from mtp_jax.errors import UserError
from mtp_jax.sandbox import bubblewrap
from mtp_jax.sandbox.programs import (
    FunctionTests,
    Limits,
    Program,
    ScriptTests,
    same_output,
)
from mtp_jax.sandbox.sandbox import Sandbox

CONTAINED = FunctionTests(("assert f() == 'contained'",), ("f",))
SHORT = Limits(cpu_s=1, wall_s=4.0, memory_mib=256)


def working_sandbox(limits):
    """A sandbox; the tests that need one are skipped where none can be."""
    try:
        return Sandbox(limits)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sandbox():
    return working_sandbox(SHORT)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A file, a listening port and a process that programs must not reach."""
    file = tmp_path_factory.mktemp("host") / "file"
    file.write_text("secret")
    victim = subprocess.Popen(["sleep", "600"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield file, server, victim
    victim.kill()
    victim.wait()


@pytest.fixture(scope="module")
def verdicts(sandbox, host):
    """Verdicts on all hostile programs, run side by side, by their names."""
    file, server, victim = host
    os.environ["MTP_TEST_SECRET"] = "SECRET"
    given = {
        "TARGET": str(file),
        "PORT": server.getsockname()[1],
        "HOST": victim.pid,
        "ROOTS": {"usr", "lib", "lib64", "lib32", "libx32", "dev"},
    }
    programs = {name: hostile.attempt(name, **given) for name in hostile.ATTEMPTS}
    programs |= hostile.ENDLESS | hostile.FORGED
    found = sandbox.run_all([Program(c, CONTAINED) for c in programs.values()], 6)
    del os.environ["MTP_TEST_SECRET"]
    return dict(zip(programs, found, strict=True))


def sandboxed_processes():
    """Processes of this machine that belong to a sandbox."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if b"mtp_jax.sandbox.guest" in line and str(os.getpid()) != path.parent.name:
            found.append(path.parent.name)
    return found


def test_there_are_sixty_hostile_programs():
    kinds = (hostile.ATTEMPTS, hostile.ENDLESS, hostile.FORGED)

    assert sum(map(len, kinds)) >= 60


@pytest.mark.parametrize("name", hostile.ATTEMPTS)
def test_attempts_come_to_nothing(verdicts, name):
    assert verdicts[name].passed, verdicts[name].why


@pytest.mark.parametrize("name", hostile.ENDLESS)
def test_what_does_not_end_is_ended(verdicts, name):
    assert not verdicts[name].passed
    assert verdicts[name].why


@pytest.mark.parametrize("name", hostile.FORGED)
def test_verdicts_cannot_be_forged(verdicts, name):
    assert not verdicts[name].passed
    assert verdicts[name].why


def test_the_host_is_as_before(verdicts, host, sandbox):
    file, server, victim = host

    assert verdicts
    assert file.read_text() == "secret"
    assert victim.poll() is None
    with pytest.raises(BlockingIOError):
        server.accept()
    deadline = time.monotonic() + 5
    while sandboxed_processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sandboxed_processes() == []
    assert sandbox.run(Program("def f(): return 'contained'", CONTAINED)).passed


def test_attempts_succeed_without_the_sandbox(host):
    """The control: the same programs would notice if nothing held them."""
    file, _, victim = host
    given = {"TARGET": str(file), "PORT": 0, "HOST": victim.pid, "ROOTS": {"usr"}}
    open_house = Sandbox(SHORT, unsafe=True)
    names = ["reads /etc/passwd", "lists /proc", "finds a file of the host", "listens",
             "finds a descriptor of the host", "keeps a file in memory"]  # fmt: skip
    programs = [Program(hostile.attempt(n, **given), CONTAINED) for n in names]

    found = open_house.run_all(programs)

    assert [v.passed for v in found] == [False] * len(names)
    assert all(v.why == "AssertionError" for v in found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_programs_leave_nothing(sandbox):
    """No process, no descriptor, no file, no growth of this process."""
    names = [*hostile.FORGED, "takes memory at once", "starts Python", "forks"]
    codes = {**hostile.FORGED, **hostile.ENDLESS}
    programs = [
        Program(codes.get(name) or hostile.attempt(name), CONTAINED) for name in names
    ]
    programs += [Program("def f(): return 'contained'", CONTAINED)] * 6
    sandbox.run_all(programs)
    descriptors, kib = len(os.listdir("/proc/self/fd")), resident_kib()
    files = set(os.listdir("/tmp"))

    rounds = -(-1000 // len(programs))
    for _ in range(rounds):
        found = sandbox.run_all(programs)
        assert [v.passed for v in found[-6:]] == [True] * 6

    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resident_kib() - kib < 20_000
    assert {x for x in os.listdir("/tmp") if "sandbox" in x} <= files
    time.sleep(1)
    assert sandboxed_processes() == []


def resident_kib():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS")).split()[1])


def test_data_of_every_kind_crosses_unchanged(sandbox):
    values = [
        "None", "True", "-7", "10 ** 30", "1.5", "1e300", "float('inf')", "2 + 3j",
        "'a\\u2028\\ud800'", "b'\\x00'", "[1, (2, [3]), {4}, frozenset({5})]",
        "{(1, 2): {'a': None}, 3.0: []}", "range(2, 9, 3)", "int",
        "__import__('collections').deque([1])",
        "__import__('decimal').Decimal('1.10')",
        "__import__('fractions').Fraction(1, 3)",
        "__import__('datetime').date(2020, 2, 3)",
    ]  # fmt: skip
    tests = tuple(
        f"x = {v}\nassert f(x) == x and type(f(x)) is type(x)" for v in values
    )

    verdict = sandbox.run(Program("def f(x): return x", FunctionTests(tests, ("f",))))

    assert verdict.passed, verdict.why


def test_tests_may_use_objects_errors_and_changed_arguments(sandbox):
    code = (
        "class Node:\n"
        "    def __init__(self, value): self.value, self.next = value, None\n"
        "def length(node): return 0 if node is None else 1 + length(node.next)\n"
        "def count(n):\n    for i in range(n): yield i\n"
        "def double(xs):\n    xs[:] = [2 * x for x in xs]\n"
        "def refuse(x): raise ValueError('no ' + x)\n"
    )
    tests = (
        "node = Node(1)\nnode.next = Node(2)\nassert length(node) == 2",
        "assert node.next.value == 2 and list(count(3)) == [0, 1, 2]",
        "xs = [1, 2]\ndouble(xs)\nassert xs == [2, 4]",
        "try:\n    refuse('x')\n    assert False\nexcept ValueError as e:\n"
        "    assert str(e) == 'no x'",
    )
    names = ("Node", "length", "count", "double", "refuse")

    verdict = sandbox.run(Program(code, FunctionTests(tests, names)))

    assert verdict.passed, verdict.why


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print(int(input()) * 2)", ""),
        ("print(float(input()) * 2)", ""),  # 4.0 for 4
        ("print(5)", "input 1: another output"),
        ("print(4)", "input 2: another output"),
        ("print(4); raise SystemExit(3)", "input 1: exit code 3"),
        ("print(input() / 2)", "input 1: exit code 1"),
        (
            "while True: print('x' * 10**5)",
            "input 1: more than 1048576 bytes of output",
        ),
        ("import time; time.sleep(99)", "input 1: no end within 4 s"),
    ],
)
def test_scripts_are_judged_by_what_they_print(sandbox, code, why):
    verdict = sandbox.run(Program(code, ScriptTests((("2\n", "4"), ("3", "6\n")))))

    assert (verdict.passed, verdict.why) == (not why, why)


def test_outputs_are_compared_by_lines_and_numbers():
    assert same_output(" 1 2 \n3\n", "1 2\n3")
    assert same_output("0.3333333", "0.33333334")
    assert not same_output("0.3", "0.33")
    assert not same_output("1\n2", "2\n1")
    assert not same_output("yes", "Yes")


def test_without_bubblewrap_programs_are_refused(monkeypatch):
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: None)

    with pytest.raises(UserError, match=r"not installed \(apt install bubblewrap\)"):
        Sandbox()


def test_a_bubblewrap_that_does_not_work_is_told(tmp_path, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
    for path in (fake, *fake.parents[: len(fake.parents) - 2]):
        path.chmod(0o755)
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: str(fake))

    with pytest.raises(UserError, match="said 'bwrap: No permissions'"):
        Sandbox()


def test_the_interpreter_is_one_that_nobody_can_run():
    if os.getuid() == 0 and not shutil.which("python3", path="/usr/bin"):
        pytest.skip("no Python of the system")
    found = bubblewrap.find_interpreter(as_nobody=True)

    assert all(p.stat().st_mode & 1 for p in pathlib.Path(found.path).parents)
