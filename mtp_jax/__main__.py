"""The program: `python -m mtp_jax VERB`, also installed as `mtp-jax`."""

import importlib
import os
import re
import sys

from mtp_jax.errors import RunFailed, UserError, told_as

_USAGE = """\
usage: mtp-jax VERB [options]

Multi-token prediction: train a model with n heads, and let it draft for itself.

  prepare   text, JSONL or code into a tokenized corpus
  count     how often tokens of a corpus follow each other, for dynamo
  train     train a model; the same command again continues the run
  runs      list the runs under a folder: step, loss, how their configs differ
  evaluate  measure a trained model on held-out text
  generate  decode from a trained model
  verify    prove on a trained model that drafting changes nothing
  calibrate measure the heads and choose a tree of drafts
  audit     prove from a run's files which data it has seen
  plan      what a training step costs on a TPU, without one
  rehearse  faults of a pod, injected into a small run on this machine

mtp-jax VERB --help tells the options of a verb; mtp-jax --version tells the versions
that a bug report needs, and what else to send with it."""

_MODULES = {
    "prepare": "mtp_jax.cli.prepare",
    "count": "mtp_jax.cli.count",
    "train": "mtp_jax.cli.train",
    "runs": "mtp_jax.cli.runs",
    "evaluate": "mtp_jax.cli.evaluate",
    "generate": "mtp_jax.cli.generate",
    "verify": "mtp_jax.cli.verify",
    "calibrate": "mtp_jax.cli.calibrate",
    "audit": "mtp_jax.cli.audit",
    "plan": "mtp_jax.cli.plan",
    "rehearse": "mtp_jax.cli.rehearse",
}
_VERBS = tuple(_MODULES)


def main() -> int:
    """Runs a verb; the exit code is 0, 1 for a run that failed, 2 for bad input."""
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
        return importlib.import_module(_MODULES[verb]).main(argv)
    except (UserError, RunFailed) as error:
        code, shown, _ = told_as(error)
        print(shown, file=sys.stderr)
        return code


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
    sys.exit(main())
