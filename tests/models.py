"""Small models, their parameters and their batches, placed on a mesh."""

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding

from mtp_jax.config import Config, MeshConfig, ModelConfig
from mtp_jax.model.attention import RowContext
from mtp_jax.model.heads.walk import HeadRunner, all_hidden, tokens_before
from mtp_jax.model.language_model import model_builder, run_trunk
from mtp_jax.parallel.sharding import make_mesh, spec

TINY = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    n_future_tokens=2,
    num_query_heads=4,
    num_kv_heads=2,
    d_head=4,
    d_ff=24,
)


def tiny_config(**of_model):
    """A run of a model so small that its program compiles in a second."""
    return Config(model=dataclasses.replace(TINY, **of_model))


def mesh_of(replica=1, fsdp=1, tensor=1, sequence=1, vocab=1):
    """A mesh of as many of the devices as it needs."""
    axes = dict(replica=replica, vocab=vocab, fsdp=fsdp, tensor=tensor)
    cfg = MeshConfig(**axes, sequence=sequence)
    return make_mesh(cfg, jax.devices()[: math.prod(axes.values()) * sequence])


def random_params(cfg, seed=0):
    """NumPy parameters of a size at which every part of the model matters.

    Unlike initial ones, no norm's scale is 1. Needs the mesh to be set.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        size = 0.3 * rng.normal(size=x.shape)
        return np.asarray(size if path[-1].key.startswith("w_") else 1 + size, x.dtype)

    return jax.tree.map_with_path(draw, _shapes(cfg, jax.sharding.get_mesh()))


def placed_params(cfg, params):
    """Parameters on the current mesh, sharded as the model wants them."""
    mesh = jax.sharding.get_mesh()

    def place(x, like):
        return jax.device_put(x, NamedSharding(mesh, like.sharding.spec))

    return jax.tree.map(place, params, _shapes(cfg, mesh))


@functools.cache
def _shapes(cfg, _):
    return jax.eval_shape(model_builder(cfg)[0], jax.random.key(0))


def placed_batch(rows, accumulation):
    """Rows [R, ...] as the microbatches of a step [A, R / A, ...], sharded by row."""
    sharding = NamedSharding(jax.sharding.get_mesh(), spec(None, "batch", None))
    return {
        name: jax.device_put(x.reshape(accumulation, -1, x.shape[-1]), sharding)
        for name, x in rows.items()
    }


def all_logits(model, tokens_BT, segments_BT, positions_BT):
    """Logits of every head by the layers that training uses, [N, B, T, V]."""
    rows = RowContext(model.angles(positions_BT), segments_BT)
    trunk_BTD = run_trunk(model, model.embed(tokens_BT), rows, "xla")
    before_NBT = tokens_before(model.cfg, tokens_BT)
    runner = HeadRunner(model.cfg, rows, "xla")
    return all_hidden(runner, model.parts(trunk_BTD), before_NBT)[1]
