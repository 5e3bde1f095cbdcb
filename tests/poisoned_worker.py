"""One of two hosts, of which the second has a row that makes its gradients NaN.

python poisoned_worker.py HOST:PORT I
"""

import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from models import mesh_of, tiny_config

from mtp_jax.distributed import hosts, lifetime
from mtp_jax.distributed.cluster import ProcessInfo
from mtp_jax.parallel.to_devices import batch_sharding, place_rows, rows_of_process
from mtp_jax.training.train_step import make_init, make_step

POISON = 31


def main():
    os.environ.setdefault("MTP_JAX_SECRET", "the secret of the tests")
    lifetime.end_with_parent(int(os.environ.pop(lifetime.PARENT)))
    hosts.join(ProcessInfo(sys.argv[1], 2, int(sys.argv[2])), 120, 60)
    cfg = tiny_config()
    mesh = mesh_of(1, 2, 1)
    with jax.set_mesh(mesh):
        state = make_init(cfg)(jax.random.key(0))
        state = jax.jit(poisoned)(state)
        before = [
            np.array(x.addressable_data(0)) for x in jax.tree.leaves(state.params)
        ]
        sharding = batch_sharding(mesh)
        rows = rows_of_process(sharding, 2)
        local = batch(rows)
        assert (POISON in local["tokens"]) == (jax.process_index() == 1)
        state, metrics = make_step(cfg)(state, place_rows(local, rows, sharding, 2))
        after = [x.addressable_data(0) for x in jax.tree.leaves(state.params)]
        same = all(
            np.array_equal(a, b, equal_nan=True)
            for a, b in zip(before, after, strict=True)
        )
        print("bad", int(metrics["bad_steps"]), "same", same, flush=True)
    hosts.leave()


def poisoned(state):
    def poison(path, x):
        if path[-1].key != "w_embedding":  # so that only rows that read it are bad
            return x
        tokens = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.shape.index(32))
        sharding = jax.typeof(x).sharding
        tokens = jax.sharding.reshard(tokens, sharding)
        return jnp.where(tokens == POISON, jnp.nan, x)

    params = jax.tree.map_with_path(poison, state.params)
    return dataclasses.replace(state, params=params)


def batch(rows):
    """A row of small tokens for the first host, one with the poison for the other."""
    tokens = np.tile(np.arange(10, dtype=np.int32), (len(rows), 1))
    tokens[rows == 1, 3] = POISON
    return {
        "tokens": tokens,
        "segments": np.ones_like(tokens),
        "positions": np.tile(np.arange(10, dtype=np.int32), (len(rows), 1)),
        "hash": np.zeros((len(rows), 2), np.uint32),
    }


if __name__ == "__main__":
    main()
