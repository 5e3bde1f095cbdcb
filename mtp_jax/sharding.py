"""The mesh, and the one table from logical axes to mesh axes.

The mesh is in explicit mode: the sharding of an array is part of its type, and an
operation whose result could be laid out in several ways is told which.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from mtp_jax.config import Config, MeshConfig
from mtp_jax.errors import UserError

_MESH_AXES: dict[str | None, tuple[str, ...] | str | None] = {
    None: None,
    "batch": ("replica", "fsdp"),
    "embed": "fsdp",  # width of weights; activations keep it whole
    "heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
}


def spec(*axes: str | None) -> PartitionSpec:
    """`spec("embed", "heads", None)` is `PartitionSpec("fsdp", "tensor", None)`."""
    return PartitionSpec(*(_MESH_AXES[axis] for axis in axes))


def axes_of(axis: str) -> tuple[str, ...] | str:
    """Mesh axes of a logical one, for collectives: `axes_of("vocab")` is "tensor"."""
    axes = _MESH_AXES[axis]
    assert axes is not None, axis
    return axes


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, or over all of all processes.

    An axis of -1 takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(cfg)
    count = jax.device_count() if devices is None else len(devices)
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(count // known if s == -1 else s for s in sizes.values())
    if math.prod(shape) != count:
        raise UserError(
            f"config.mesh {sizes} does not multiply to the {count} devices that are "
            "there; change an axis, or give one of them as -1."
        )
    axis_types = (AxisType.Explicit,) * len(shape)
    return jax.make_mesh(shape, tuple(sizes), axis_types, devices=devices)


def abstract_tree(tree: Any, mesh: Mesh) -> Any:
    """Shapes with shardings on a mesh, from what `eval_shape` gives."""

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else jax.P()
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(concrete, tree)


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards the rows of a batch are split."""
    return mesh.shape["replica"] * mesh.shape["fsdp"]


def check_divisible(cfg: Config, mesh: Mesh) -> None:
    """Refuses a config whose arrays do not split evenly over the mesh.

    Raises:
      UserError: naming the field, its size and the axes.
    """
    model = cfg.model
    microbatch = cfg.data.batch_size // cfg.train.accumulation
    splits = [
        ("data.batch_size / train.accumulation", microbatch, "batch"),
        ("model.d_model", model.d_model, "embed"),
        ("model.num_query_heads", model.num_query_heads, "heads"),
        ("model.num_kv_heads", model.num_kv_heads, "heads"),
        ("model.d_ff", model.d_ff, "ff"),
        ("model.vocab_size", model.vocab_size, "vocab"),
    ]
    for field, size, logical in splits:
        axes = _MESH_AXES[logical]
        names = (axes,) if isinstance(axes, str) else axes or ()
        shards = math.prod(mesh.shape[name] for name in names)
        if size % shards:
            raise UserError(
                f"config.{field} ({size}) is not divisible by the {shards} devices of "
                f"config.mesh.{' x '.join(names)}."
            )
