"""Programs to judge, what is asked of them, and the verdicts."""

import dataclasses
import os


@dataclasses.dataclass(frozen=True)
class FunctionTests:
    """Tests that call what a program defines."""

    tests: tuple[str, ...]  # code a test, all run in one namespace, as asserts
    names: tuple[str, ...]  # functions and classes of the program that tests use
    setup: str = ""  # code before the tests


@dataclasses.dataclass(frozen=True)
class ScriptTests:
    """Inputs of a program that reads and prints, and what it should print."""

    cases: tuple[tuple[str, str], ...]  # standard input, expected output


@dataclasses.dataclass(frozen=True)
class Program:
    """Code that nobody trusts, and its tests."""

    code: str
    tests: FunctionTests | ScriptTests


@dataclasses.dataclass(frozen=True)
class Verdict:
    """True for a program that passed all tests; else why it did not, in a line."""

    passed: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a program, and of its judge."""

    cpu_s: int = 3  # seconds of the processor
    wall_s: float = 10.0  # from start to verdict; longer, as machines are busy
    memory_mib: int = 512  # address space
    threads: int = 16
    files: int = 32  # that are open
    output_bytes: int = 1 << 20  # of a script

    def resources(self, *, count_processes: bool) -> dict[str, int]:
        """Limits by the names that `resource` has for them.

        `count_processes` limits threads, which needs a user namespace of its own: else
        all processes of the user count.
        """
        memory = self.memory_mib << 20
        found = {"CPU": self.cpu_s, "AS": memory, "FSIZE": 0, "CORE": 0}
        found |= {"NOFILE": self.files, "STACK": 64 << 20}
        # Two more: the program's process, and the first one of its namespace.
        return found | ({"NPROC": self.threads + 2} if count_processes else {})


def same_output(found: str, expected: str) -> bool:
    """True if a script printed what it should.

    Lines are compared without the space around them; words that differ may be numbers
    that are the same to a relative 1e-5, as in APPS's own tests.
    """
    of_found, of_expected = found.strip().split("\n"), expected.strip().split("\n")
    if len(of_found) != len(of_expected):
        return False
    return all(map(_same_line, of_found, of_expected))


def _same_line(found: str, expected: str) -> bool:
    if found.strip() == expected.strip():
        return True
    of_found, of_expected = found.split(), expected.split()
    if len(of_found) != len(of_expected):
        return False
    return all(map(_same_word, of_found, of_expected))


def _same_word(found: str, expected: str) -> bool:
    if found == expected:
        return True
    try:
        x, y = float(found), float(expected)
    except ValueError:
        return False
    return abs(x - y) <= 1e-8 + 1e-5 * abs(y)


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0))
