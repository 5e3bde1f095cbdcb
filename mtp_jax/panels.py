"""Matrices stored in panels, and their products, for decoding on a CPU.

A forward pass of decoding costs what reading the weights does, if its products keep up
with the memory. XLA's do for one token, but take up to twice as long for the four or
eight that drafting needs; the program in `panels.cc` keeps up for these, too. It is
compiled for this machine when it is first asked for, by the compiler that $CXX names or
else `c++`, and kept in the user's cache folder. Without a compiler, or with CXX set to
nothing, decoding uses XLA's products.

Axes: B batch, T time, M tokens, I inputs, O outputs, P panels, J outputs of a panel.
"""

import ctypes
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import jaxlib
from jax.typing import DTypeLike

WIDTH = 32  # J: outputs whose weights for an input lie together

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_NAME = "mtp_jax_panels"  # the function there
_BUILD_S = 120  # seconds that a compiler may take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Panels:
    """A matrix; the outputs that are missing in the last panel are zeros."""

    w_PIJ: jax.Array  # float32
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def project(self, x: jax.Array, out: jax.sharding.PartitionSpec) -> jax.Array:
        """x [B, T, *inputs] times the matrix, float32 [B, T, *outputs], as `out`."""

        def local(x, w_PIJ):
            x_MI = x.reshape(-1, w_PIJ.shape[1])
            y_MO = product(x_MI, w_PIJ)[:, : math.prod(self.outputs)]
            return y_MO.reshape(*x.shape[:2], *self.outputs)

        # With one device every layout is the same; the specs only name it.
        in_specs = (jax.typeof(x).sharding.spec, jax.typeof(self.w_PIJ).sharding.spec)
        project = jax.shard_map(
            local, in_specs=in_specs, out_specs=out, check_vma=False
        )
        return project(x, self.w_PIJ)


def are_served(dtype: DTypeLike) -> bool:
    """Whether a CPU has products with panels: in float32, and if they compile."""
    return jnp.dtype(dtype) == jnp.float32 and _is_registered()


def pack(w_OI: jax.Array, outputs: tuple[int, ...]) -> Panels:
    """A matrix [O, I] in panels; O are the `outputs`, as one axis."""
    panels = -(-w_OI.shape[0] // WIDTH)
    whole_OI = jnp.pad(w_OI, ((0, panels * WIDTH - w_OI.shape[0]), (0, 0)))
    w_PJI = whole_OI.reshape(panels, WIDTH, w_OI.shape[1])
    return Panels(jnp.swapaxes(w_PJI, 1, 2), outputs)


def product(x_MI: jax.Array, w_PIJ: jax.Array) -> jax.Array:
    """x times the matrix, float32 [M, P J]; on one CPU, and if they `are_served`.

    An output of a token is the same, bit for bit, whatever other tokens there are.
    """
    p, _, j = w_PIJ.shape
    shape = jax.ShapeDtypeStruct((x_MI.shape[0], p * j), jnp.float32)
    call = jax.ffi.ffi_call(_NAME, shape, vmap_method="sequential")
    return call(x_MI, w_PIJ)


@functools.cache
def _is_registered() -> bool:
    """Builds it and tells XLA of it, once; says on stderr if that fails."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
    except ValueError:  # a quote without its other half
        return False
    if not compiler or shutil.which(compiler[0]) is None:
        return False
    try:
        function = getattr(ctypes.CDLL(str(_library(compiler))), _NAME)
    # The last one: who runs this has no home.
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        said = str(getattr(error, "stderr", None) or "").strip() or str(error)
        print(
            f"mtp-jax: warning: {shlex.join(compiler)} cannot compile {_SOURCE.name}, "
            "decoding takes longer without; CXX= leaves it off: "
            f"{said.splitlines()[0]}",
            file=sys.stderr,
        )
        return False
    jax.ffi.register_ffi_target(_NAME, jax.ffi.pycapsule(function), platform="cpu")
    return True


def _library(compiler: list[str]) -> pathlib.Path:
    """The compiled program, made unless it is there for this source and processor."""
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    native = "-mcpu=native" if is_arm else "-march=native"
    command = [*compiler, "-std=c++17", "-O3", native]
    # What the compiler has to say of itself and of the processor.
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    text = "\n".join([_SOURCE.read_text(), macros, jaxlib.__version__, *command])
    name = f"{_NAME}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"

    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(root) / "mtp_jax"
    library = folder / name
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            out = pathlib.Path(made) / name
            shared = ["-fPIC", "-shared", f"-I{jax.ffi.include_dir()}"]
            _run([*command, *shared, str(_SOURCE), "-o", str(out)])
            out.replace(library)  # whole, whoever else makes it at the same time
    return library


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_BUILD_S
    )
    return done.stdout
