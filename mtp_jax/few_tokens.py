"""A few tokens times a matrix of weights, in one reading of the weights, on a CPU.

XLA's own product reads them once for one token, but takes up to twice as long for four
or eight, which is what drafting needs. The program in `few_tokens.cc` is compiled for
this machine when it is first asked for, by the compiler that $CXX names or else `c++`,
and kept in the user's cache folder. Without a compiler, or with CXX set to nothing,
XLA's product is used.

Axes: M tokens, I inputs, O outputs.
"""

import ctypes
import functools
import hashlib
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

MOST = 8  # tokens
# Beyond, what a pass takes is decided by the memory, and XLA's product is as fast.
MOST_INPUTS = 1024

_SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_NAME = "mtp_jax_few_tokens"  # the function there
_BUILD_S = 120  # seconds that a compiler may take


def takes(tokens: int, inputs: int, *dtypes: DTypeLike) -> bool:
    """Whether `product` is to be had for such tokens and types, and worth having.

    One token is left to XLA, whose product is as fast.
    """
    floats = all(jnp.dtype(dtype) == jnp.float32 for dtype in dtypes)
    few = 1 < tokens <= MOST and inputs <= MOST_INPUTS
    return few and floats and _is_registered()


@jax.custom_jvp
def product(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x times w transposed, float32 [M, O]; on one CPU, and if it `takes` them."""
    shape = jax.ShapeDtypeStruct((x_MI.shape[0], w_OI.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call(_NAME, shape, vmap_method="sequential")
    return call(x_MI, w_OI)


@product.defjvp
def _tangent(primals, tangents):
    (x_MI, w_OI), (dx_MI, dw_OI) = primals, tangents
    return product(x_MI, w_OI), dx_MI @ w_OI.T + x_MI @ dw_OI.T


@functools.cache
def _is_registered() -> bool:
    """Builds it and tells XLA of it, once; says on stderr if that fails."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler or shutil.which(compiler[0]) is None:
        return False
    try:
        function = getattr(ctypes.CDLL(str(_library(compiler))), _NAME)
    # The last one: who runs this has no home.
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        said = str(getattr(error, "stderr", None) or "").strip() or str(error)
        print(
            f"mtp-jax: warning: {shlex.join(compiler)} cannot compile {_SOURCE.name}, "
            "drafting takes longer without; CXX= leaves it off: "
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
