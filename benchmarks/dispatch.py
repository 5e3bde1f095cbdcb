"""The call of a step that does not wait for it: Python's part, and the rest.

Python's part is that of a program that has the step's arguments and results and does
next to nothing, handed over by the same jax: by itself, and after a step, whose threads
have had the caches and the clock of a CPU's cores. What the step's own call takes
beyond that is its launch, which on a CPU is work of the thread that calls.

python -m benchmarks.dispatch --steps=200
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import (
    Training,
    one_device,
    options,
    print_environment,
    print_table,
    script,
)
from mtp_jax.cli.args import config_from
from mtp_jax.training.train_step import make_step

TINY = pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"


@script
def main(argv: list[str]) -> int:
    """Prints the time of handing over, of the call, and of the step."""
    args = options(argv, "Time of a step's call, not waited for.", steps=200)
    cfg = config_from(str(TINY), [])
    print_environment(args.steps)
    alone: list[float] = []
    after: list[float] = []
    called: list[float] = []
    done: list[float] = []
    with jax.set_mesh(one_device()):
        training = Training(cfg)
        state, batch, step = training.state, training.batch, make_step(cfg)
        little = _little(jax.eval_shape(step, state, batch)[1])
        for f in (step, little, step, little):
            state, _ = jax.block_until_ready(f(state, batch))
        for _ in range(args.steps):
            state, call_s, _ = _timed(little, state, batch)
            alone.append(call_s)
        for _ in range(args.steps):
            for f, calls in ((little, []), (little, after), (step, called)):
                state, call_s, done_s = _timed(f, state, batch)
                calls.append(call_s)
            done.append(done_s)
    print_table(
        ("microseconds", "median", "quartiles"),
        ("handed over", *_microseconds(alone)),
        ("handed over, after a step", *_microseconds(after)),
        ("call", *_microseconds(called)),
        ("call and step", *_microseconds(done)),
    )
    return 0


def _timed(f: Any, state: Any, batch: Any) -> tuple[Any, float, float]:
    """The new state, and the seconds until the call is over, and until the work is."""
    began = time.perf_counter()
    state, metrics = f(state, batch)
    called = time.perf_counter()
    jax.block_until_ready((state, metrics))
    return state, called - began, time.perf_counter() - began


def _little(metrics: Any) -> Any:
    """A program with a step's arguments and results, the state donated, and no work."""

    @jax.jit(donate_argnums=0)
    def little(state, batch):
        del batch
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
        return dataclasses.replace(state, step=state.step + 1), zeros

    return little


def _microseconds(seconds: list[float]) -> tuple[str, str]:
    low, median, high = np.percentile(seconds, (25, 50, 75)) * 1e6
    return f"{median:.0f}", f"{low:.0f}..{high:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
