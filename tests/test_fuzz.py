"""Bad inputs and settings by seed: no traceback, nothing partial, no silence."""

import subprocess
import sys

import pytest
from runs import ROOT


def _fuzzed(*options):
    """What the fuzzer prints; it forks, and so must not share a process with JAX."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "fuzz.py", *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_bad_input_is_refused_in_a_line():
    told = _fuzzed("--cases=90", "--seed=3", "--fast")

    assert " 0 failed" in told


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_bad_input_of_every_kind_is_refused_in_a_line():
    told = _fuzzed("--cases=150", "--seed=4")

    assert "150 cases" in told and " 0 failed" in told
