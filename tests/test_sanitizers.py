"""The C++ kernels in a program of their own, under sanitizers of memory and threads."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

from mtp_jax.decode.cpu import native

pytestmark = pytest.mark.slow

DRIVER = pathlib.Path(__file__).parent / "sanitizers"
KERNELS = pathlib.Path(native.__file__).parent
SANITIZERS = ("address,undefined", "thread")


def run(command):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The program for each sanitizer; skips where the compiler has none of them."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler or shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("sanitized")
    empty = folder / "empty.cc"
    empty.write_text("int main() {}\n")
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread"]
    if os.uname().machine == "x86_64":
        flags.append("-march=native")
    made = {}
    for name in SANITIZERS:
        checks = [f"-fsanitize={name}", "-fno-sanitize-recover=all"]
        probe = [*compiler, *checks, empty, "-o", folder / "empty"]
        if run(probe).returncode or run([folder / "empty"]).returncode:
            pytest.skip(f"no -fsanitize={name} with {compiler[0]} here")
        made[name] = folder / name
        build = [*compiler, *flags, *checks, f"-I{DRIVER}", f"-I{KERNELS}"]
        done = run([*build, DRIVER / "kernels.cc", "-o", made[name]])
        assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_kernels_are_clean(programs, sanitizer):
    done = run([programs[sanitizer]])

    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("sanitizer", "error", "report"),
    [
        ("address,undefined", "out_of_bounds", "heap-buffer-overflow"),
        ("address,undefined", "misaligned", "load of misaligned address"),
        ("thread", "race", "data race"),
    ],
)
def test_a_planted_error_is_found(programs, sanitizer, error, report):
    done = run([programs[sanitizer], error])

    assert done.returncode != 0
    assert report in done.stderr
