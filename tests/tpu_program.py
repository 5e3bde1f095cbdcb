"""Compiles the gradients of a small model for four TPU chips; needs none, only libtpu.

python tests/tpu_program.py REMAT ...

Prints, of each program, the kernels it calls and the bytes it holds beside its
arguments, on a device and on the host. In a process of its own, since what libtpu reads
from the environment must be set before jax starts.
"""

import json
import os
import sys

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to ask about
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mtp_jax.config import ComputeConfig, Config, MeshConfig, ModelConfig
from mtp_jax.model.language_model import model_builder
from mtp_jax.parallel.sharding import make_mesh, spec
from mtp_jax.training.train_step import make_gradients

ROWS, T = 4, 256
MODEL = ModelConfig(
    vocab_size=128,
    d_model=256,
    num_layers=258,  # so that what is kept of them does not fit on the chip itself
    n_future_tokens=2,
    num_query_heads=4,
    num_kv_heads=2,
    d_head=64,
    d_ff=256,
    compute_dtype="bfloat16",
)


def main():
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = {remat: program(mesh, remat) for remat in sys.argv[1:]}
    print(json.dumps(found))


def program(mesh, remat):
    cfg = Config(model=MODEL, compute=ComputeConfig(remat=remat))
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.tree.map(
        lambda x: abstract(mesh, x.shape, x.dtype, x.sharding.spec),
        jax.eval_shape(model_builder(MODEL)[0], key),
    )
    row = abstract(
        mesh, (1, ROWS, T + 2), jnp.dtype("int32"), spec(None, "batch", None)
    )
    batch = dict.fromkeys(("tokens", "segments", "positions"), row)
    compiled = jax.jit(make_gradients(cfg)).lower(params, batch).compile()
    memory = compiled.memory_analysis()
    return {
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "device": memory.temp_size_in_bytes,
        "host": memory.host_temp_size_in_bytes,
    }


def abstract(mesh, shape, dtype, axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))


if __name__ == "__main__":
    main()
