"""The mesh, and the one table from logical axes to mesh axes.

The mesh is in explicit mode: the sharding of an array is part of its type, and an
operation whose result could be laid out in several ways is told which.

Axes of the mesh, from the slowest network to the fastest: replica (copies of the model,
over slices too), fsdp (rows, parameters), sequence (positions of a row, parameters),
tensor (attention heads, feed-forward width, vocabulary).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from mtp_jax.config import Config, MeshConfig
from mtp_jax.errors import UserError
from mtp_jax.parallel.zigzag import pieces

_MESH_AXES: dict[str | None, tuple[str, ...] | str | None] = {
    None: None,
    "batch": ("replica", "fsdp"),
    "time": "sequence",  # of activations in training; decoding keeps it whole
    "copies": ("replica", "fsdp", "sequence"),  # devices with tokens of their own
    "embed": ("fsdp", "sequence"),  # width of weights; activations keep it whole
    "heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
}


def spec(*axes: str | None) -> PartitionSpec:
    """The partition spec of logical axes.

    `spec("time", "heads", None)` is `PartitionSpec("sequence", "tensor", None)`.
    """
    return PartitionSpec(*(_MESH_AXES[axis] for axis in axes))


def spec_like(x_BTX: jax.Array, *axes: str | None) -> PartitionSpec:
    """The spec of activations [B, T, *axes] whose time is laid out as that of x_BTX.

    So a layer serves training, which splits rows, and decoding, which does not.
    """
    time = jax.typeof(x_BTX).sharding.spec[1]
    return PartitionSpec(_MESH_AXES["batch"], time, *spec(*axes))


def time_parts(x_BTX: jax.Array) -> int:
    """The number of devices over which activations [B, T, ...] split their time."""
    mesh = jax.sharding.get_abstract_mesh()
    return shards_of("time", mesh) if spec_like(x_BTX)[1] else 1


def axes_of(axis: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis, for collectives: ("tensor",) of "vocab"."""
    axes = _MESH_AXES[axis]
    assert axes is not None, axis
    return (axes,) if isinstance(axes, str) else axes


def on_cpus() -> bool:
    """Returns True if the mesh that is set is of CPU devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "cpu"


def on_one_cpu() -> bool:
    """Returns True if the mesh that is set is one CPU device."""
    return jax.sharding.get_abstract_mesh().size == 1 and on_cpus()


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh over `devices`; None: over all devices of all processes.

    An axis of -1 takes what is left. Where the devices are of several slices, only
    replicas are on different ones, since slices talk to each other slowly.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or replicas do not
        split evenly over the slices.
    """
    sizes = dataclasses.asdict(cfg)
    devices = jax.devices() if devices is None else devices
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if s == -1 else s for s in sizes.values())
    if math.prod(shape) != len(devices):
        there = f"the {len(devices)} devices that are there"
        if devices[0].platform == "cpu":
            there += " (JAX_NUM_CPU_DEVICES=N makes N of a CPU)"
        raise UserError(
            f"config.mesh {sizes} does not multiply to {there}; "
            + (
                f"the axes beside the one of -1 come to {known}."
                if -1 in sizes.values()
                else "change an axis, or give one of them as -1."
            )
        )
    slices = slice_count(devices)
    replica, *others = shape
    if replica % slices:
        raise UserError(
            f"config.mesh.replica is {replica}, with {len(devices)} devices in "
            f"{slices} slices; it must be a multiple of {slices}, as the other axes "
            "do not reach from slice to slice."
        )
    axis_types = (AxisType.Explicit,) * len(shape)
    # Some shapes need an axis of the torus split between two axes of the mesh.
    if slices > 1:
        within = (replica // slices, *others)
        across = (slices, *(1 for _ in others))
        placed = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    else:
        placed = mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return Mesh(placed, tuple(sizes), axis_types)


def slice_count(devices: Sequence[jax.Device]) -> int:
    """The number of TPU slices of some devices; 1 where there are no slices."""
    if any(device.platform != "tpu" for device in devices):
        return 1  # hosts of GPUs are numbered like slices, but reach each other fast
    return len({getattr(device, "slice_index", None) for device in devices})


def abstract_tree(tree: Any, mesh: Mesh) -> Any:
    """Gives the shapes that `eval_shape` returns shardings on a mesh."""

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else jax.P()
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(concrete, tree)


def batch_shards(mesh: Mesh) -> int:
    """The number of shards over which the rows of a batch are split."""
    return shards_of("batch", mesh)


def shards_of(axis: str, mesh: Mesh | AbstractMesh) -> int:
    """The number of devices over which a logical axis is split."""
    return math.prod(mesh.shape[name] for name in axes_of(axis))


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
        ("heads.markov_rank", model.heads.markov_rank, "embed"),
    ]
    for field, size, logical in splits:
        names = axes_of(logical)
        sizes = [mesh.shape[name] for name in names]
        if size % math.prod(sizes):
            raise UserError(
                f"config.{field} ({size}) is not divisible by the {math.prod(sizes)} "
                f"devices of config.mesh.{' x '.join(names)} "
                f"({' x '.join(map(str, sizes))}; {mesh.size} devices in all)."
            )
    parts = mesh.shape["sequence"]
    if cfg.data.seq_len % len(pieces(parts)):
        raise UserError(
            f"config.data.seq_len ({cfg.data.seq_len}) is not divisible by "
            f"{len(pieces(parts))}, the pieces of a row, two for each of the {parts} "
            f"devices of config.mesh.sequence ({mesh.size} devices in all)."
        )
