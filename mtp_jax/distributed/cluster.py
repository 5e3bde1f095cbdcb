"""The number of this process among those of a run: from options, a pod or a scheduler.

A TPU pod, GKE, Slurm and Open MPI are asked by JAX's own rules.
"""

import argparse
import dataclasses
import os

from mtp_jax.errors import RunFailed, UserError


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """One process of a run: its number, and how to reach the others."""

    coordinator_address: str  # HOST:PORT, where process 0 listens
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None  # where a scheduler shares them out


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --num_processes and --process_id to a parser."""
    group = parser.add_argument_group(
        "several hosts",
        "All three or none: what TPU pods, GKE and Slurm say is found by itself; "
        "--num_processes=1 is this process alone, whatever they say.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens"
    )
    group.add_argument("--num_processes", type=int, metavar="N")
    group.add_argument("--process_id", type=int, metavar="I", help="0 to N - 1")


def from_options(args: argparse.Namespace) -> ProcessInfo | None:
    """Returns the process that the options describe; None if they are not given.

    Raises:
      UserError: only some are given, or they contradict each other.
    """
    given = (args.coordinator, args.num_processes, args.process_id)
    if given == (None, None, None):
        return None
    if given == (None, 1, None):
        return ProcessInfo("", 1, 0)
    if None in given:
        raise UserError(
            "--coordinator, --num_processes and --process_id go together; give all "
            "three, or none where a TPU pod or Slurm tells them (--num_processes=1: "
            "this process alone)."
        )
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator={args.coordinator} is not HOST:PORT, the address at which "
            "process 0 listens."
        )
    if args.num_processes < 1:
        raise UserError(f"--num_processes={args.num_processes}; give at least 1.")
    if not 0 <= args.process_id < args.num_processes:
        raise UserError(
            f"--process_id={args.process_id} of --num_processes={args.num_processes}; "
            f"give 0 to {args.num_processes - 1}."
        )
    return ProcessInfo(*given)


def detect(timeout_s: int) -> ProcessInfo | None:
    """Returns the process that a pod or a scheduler describes; None if there is none.

    Args:
      timeout_s: how long to wait for the name of process 0 to be known.

    Raises:
      RunFailed: what they say cannot be.
    """
    from jax._src.clusters import ClusterEnv  # initialize() does not tell what it found

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout_s
        )
    except Exception as error:
        raise RunFailed(f"the hosts of this run cannot be found: {error}") from error
    address, count, index, ids = found
    if count is None or index is None or address is None:
        return None
    return ProcessInfo(address, count, index, None if ids is None else tuple(ids))
