"""Python's part of a step: how long the call takes that does not wait for it.

python -m benchmarks.dispatch --steps=200
"""

import pathlib
import sys
import time

import jax
import numpy as np

from benchmarks.timing import (
    Training,
    one_device,
    options,
    print_environment,
    print_table,
)
from mtp_jax.cli_args import config_from
from mtp_jax.train_step import make_step

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"


def main(argv: list[str]) -> int:
    """Prints the call's time, its thread's work in it, and the time of the step."""
    args = options(argv, "Time of a step's call, not waited for.", steps=200)
    cfg = config_from(str(TINY), [])
    print_environment(args.steps)
    called, worked, done = [], [], []
    with jax.set_mesh(one_device()):
        training = Training(cfg)
        state, batch, step = training.state, training.batch, make_step(cfg)
        state, _ = jax.block_until_ready(step(state, batch))
        state, _ = jax.block_until_ready(step(state, batch))
        for _ in range(args.steps):
            began, began_work = time.perf_counter(), time.thread_time()
            state, metrics = step(state, batch)
            worked.append(time.thread_time() - began_work)
            called.append(time.perf_counter() - began)
            jax.block_until_ready((state, metrics))
            done.append(time.perf_counter() - began)
    print_table(
        ("microseconds", "median", "quartiles"),
        ("call", *_microseconds(called)),
        ("call, CPU time", *_microseconds(worked)),  # of its thread alone
        ("call and step", *_microseconds(done)),
    )
    return 0


def _microseconds(seconds: list[float]) -> tuple[str, str]:
    low, median, high = np.percentile(seconds, (25, 50, 75)) * 1e6
    return f"{median:.0f}", f"{low:.0f}..{high:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
