"""Compiles the training step for TPUs that are not there.

libtpu compiles for a named topology on a host without a TPU; what it refuses for memory
would not run on one either.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.parallel.sharding import abstract_tree, check_divisible, make_mesh
from mtp_jax.parallel.to_devices import batch_sharding
from mtp_jax.planning.hlo import HloProgram, read_hlo
from mtp_jax.training.groups import trained
from mtp_jax.training.train_step import TrainState, make_init, make_step

_EXAMPLES = (
    "v4:2x2x1, v5e:4x4, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1, 2xv5p:4x4x4 for two slices, "
    "or v6e-16 as clouds say"
)
# Dimensions of a pod and chips of its largest slice; libtpu compiles for more, too.
# docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, "System architecture".
_PODS = {
    "v4": (3, 4096),
    "v5e": (2, 256),
    "v5p": (3, 6144),
    "v6e": (2, 256),
    "tpu7x": (3, 9216),
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step: bytes of a device by the compiler, and the program, if any."""

    params: int  # of the whole model
    argument_bytes: int  # the state and the batch
    temp_bytes: int  # all else that is alive at the peak
    temp_sum_bytes: int  # XLA's temp_size: more than are ever alive at the same time
    hbm_bytes: int  # arguments, temporaries and code
    limit_bytes: int | None  # memory of a device, if the compiler tells
    program: HloProgram | None  # None: it does not fit
    frozen_bytes: int = 0  # of the arguments: parameters that stay as they are


@contextlib.contextmanager
def no_devices() -> Iterator[None]:
    """Keeps JAX and libtpu from looking for devices within the context.

    A JAX that has not looked for devices before may stay on the CPU afterwards.
    """
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # Compiling takes no device, so several processes may do it at once.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # JAX could write such programs to its cache, but not read them without a device.
    wanted = {"jax_platforms": "cpu", "jax_enable_compilation_cache": False}
    kept = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)


def topology_devices(name: str) -> list[jax.Device]:
    """Returns the devices of a topology such as v5e:4x4, one a chip or one a core.

    A number in front, as in 2xv5e:4x4, is that of slices.

    Raises:
      UserError: libtpu is not installed, or there is no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("plan needs libtpu: pip install 'mtp-jax[tpu]'.")
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([A-Za-z]\w*:\d+(?:x\d+)+)", name)
    if not match:
        raise UserError(f"--topology={name} is not a topology such as {_EXAMPLES}.")
    slices, topology = int(match[1] or 1), match[2]
    kind, _, shape = topology.partition(":")
    sizes = [int(size) for size in shape.split("x")]
    dimensions, chips = _PODS.get(kind.lower(), (math.inf, math.inf))
    if len(sizes) > dimensions or math.prod(sizes) > chips:
        raise UserError(
            f"--topology={name} is no part of a pod of {kind}, which has {dimensions} "
            f"dimensions and slices of up to {chips} chips."
        )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    # A v4 chip is one device of jax, as on hosts that have one; the others are as they
    # are without being told.
    if kind.lower() == "v4":
        options["chip_config_name"] = "megacore"
    try:
        with _silenced_stderr():
            return topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        said = str(error).partition("\n")[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"--topology={name} is not one that libtpu knows ({said}); give one such "
            f"as {_EXAMPLES}."
        ) from error


@contextlib.contextmanager
def _silenced_stderr() -> Iterator[None]:
    """Drops stderr, where libtpu says, beside Python, that it has found no TPU."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as away:
            os.dup2(away.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def compile_step(cfg: Config, devices: list[jax.Device]) -> Compiled:
    """Compiles the step that training runs, for devices that need not be there.

    Raises:
      UserError: the mesh or the batch does not fit on the devices.
    """
    mesh = make_mesh(cfg.mesh, devices)
    check_divisible(cfg, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    # Not jax.set_mesh: it would want to make arrays on the devices.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = abstract_tree(jax.eval_shape(make_init(cfg), key), mesh)
        batch = abstract_batch(cfg, mesh)
        step: Any = make_step(cfg)  # jitted, so it has more than its type says
        lowered = step.lower(state, batch)
    try:
        with _silenced_stderr():
            compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = _refused(str(error), state, batch)
        return dataclasses.replace(refused, frozen_bytes=_frozen_bytes(cfg, state))
    found = compiled.memory_analysis()
    return Compiled(
        params=_count(state.params),
        argument_bytes=found.argument_size_in_bytes,
        temp_bytes=found.peak_memory_in_bytes - found.argument_size_in_bytes,
        temp_sum_bytes=found.temp_size_in_bytes,
        hbm_bytes=found.peak_memory_in_bytes + found.generated_code_size_in_bytes,
        limit_bytes=None,
        program=read_hlo(compiled.as_text()),
        frozen_bytes=_frozen_bytes(cfg, state),
    )


def abstract_batch(cfg: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Shapes, types and shardings of the batch that a step takes, [A, B, ...]."""
    rows = (cfg.train.accumulation, cfg.data.batch_size // cfg.train.accumulation)
    sharding = batch_sharding(mesh)

    def array(width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*rows, width), dtype, sharding=sharding)

    names = ("tokens", "segments", "positions")
    tokens = {name: array(cfg.row_len, jnp.int32) for name in names}
    return {**tokens, "hash": array(2, jnp.uint32)}


def _refused(message: str, state: TrainState, batch: dict[str, Any]) -> Compiled:
    """Reads the figures of a refusal for memory; any other one is raised again.

    The compiler stops before it has laid out the program, or after.
    """
    size = r"([\d.]+[KMGT]?)"
    temps = re.search(
        rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)", message
    )
    used = re.search(
        rf"Used {size} of {size} hbm.*?program +{size}.*?arguments +{size}",
        message,
        re.DOTALL,
    )
    params = _count(state.params)
    arguments = _bytes((state, batch))
    if used:
        total, limit, program, arguments = map(_size, used.groups())
        return Compiled(params, arguments, program, program, total, limit, None)
    if temps:
        # It says temporaries, and counts the arguments too.
        total, limit = map(_size, temps.groups())
        rest = total - arguments
        return Compiled(params, arguments, rest, rest, total, limit, None)
    raise jax.errors.JaxRuntimeError(message)


def _frozen_bytes(cfg: Config, state: TrainState) -> int:
    """Bytes on a device of the parameters that no step changes."""
    frozen = cfg.optim.frozen
    both = [x for x in (state.params, state.rounded_off) if x is not None]
    return sum(_bytes(x) - _bytes(trained(x, frozen)) for x in both)


def _bytes(tree: Any) -> int:
    """Bytes on a device of all arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _count(tree: Any) -> int:
    """The number of elements of all arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _size(text: str) -> int:
    """Bytes of a size as XLA prints it, such as 16.97G."""
    number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)", text).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit])
