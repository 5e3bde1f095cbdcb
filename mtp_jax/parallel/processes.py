"""Values that all processes of a run have, and programs that they begin together.

A collective does not wait long for a process that still computes or compiles, so each
function here first waits until all have come, in the order in which they call it.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtp_jax.distributed import hosts


def of_first(tree: Any) -> Any:
    """The arrays of process 0, on every process, as NumPy's.

    Args:
      tree: of arrays or numbers, of equal shapes and dtypes in all processes. Where
        there are several, what has 64 bits is rounded to 32.
    """
    hosts.wait_for_all("values of the first")
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def of_all(x: np.ndarray) -> np.ndarray:
    """The arrays of all processes, stacked [processes, ...], on every process."""
    hosts.wait_for_all("values of all")
    return np.asarray(multihost_utils.process_allgather(x))


def compile_on_all(function: Any, *args: Any) -> None:
    """Compiles what all processes are about to call, and waits until all have."""
    function.lower(*args).compile()
    hosts.wait_for_all("compiled")
